"""Settings: defaults beneath the user's, each checked and in one unit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.config
import pytest

from envship import config
from worker_bootstrap.errors import SettingInvalid


def test_defaults_are_there_after_import() -> None:
    """Without any configuration of the user, each accessor returns what envship.yaml says."""
    assert config.store() is None
    assert config.stores() == ()
    assert config.share_store() is None
    assert config.store_limit_bytes() is None
    assert config.link_mode() == "auto"
    assert config.keep_warm() == 1
    assert config.progress() is None
    phases: tuple[config.Timeout, ...] = ("prepare", "start", "commit", "upload")
    assert [config.timeout_s(phase) for phase in phases] == [600, 60, 60, 60]


def test_values_of_the_user_win_and_come_in_one_unit() -> None:
    given = {
        "envship.store": "~/chunks",
        "envship.stores": ["/opt/envs"],
        "envship.store-limit": "2 GB",
        "envship.timeouts.prepare": "120000ms",
        "envship.progress": False,
    }
    with dask.config.set(given):
        config.load_defaults()  # a second load must not put the defaults on top
        assert config.store() == Path.home() / "chunks"
        assert config.stores() == (Path("/opt/envs"),)
        assert config.store_limit_bytes() == 2_000_000_000
        assert config.timeout_s("prepare") == 120
        assert config.timeout_s("start") == 60
        assert config.progress() is False


def test_dasks_environment_variables_reach_the_settings() -> None:
    program = "from envship import config; print(config.keep_warm(), config.timeout_s('commit'))"
    environ = {**os.environ, "DASK_ENVSHIP__KEEP_WARM": "3", "DASK_ENVSHIP__TIMEOUTS__COMMIT": "5s"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "5.0"]


@pytest.mark.parametrize(
    ("setting", "value", "read"),
    [
        ("store", 7, config.store),
        ("stores", "/opt/envs", config.stores),
        ("stores", [""], config.stores),
        ("store-limit", "much", config.store_limit_bytes),
        ("store-limit", -1, config.store_limit_bytes),
        ("store-limit", True, config.store_limit_bytes),
        ("store-limit", float("inf"), config.store_limit_bytes),
        ("link-mode", "symlink", config.link_mode),
        ("keep-warm", -1, config.keep_warm),
        ("keep-warm", True, config.keep_warm),
        ("timeouts.start", "soon", lambda: config.timeout_s("start")),
        ("timeouts.start", "", lambda: config.timeout_s("start")),
        ("store-limit", "", config.store_limit_bytes),
        ("timeouts.start", 0, lambda: config.timeout_s("start")),
        ("timeouts", {}, lambda: config.timeout_s("start")),
        ("progress", "sometimes", config.progress),
    ],
)
def test_unusable_values_are_named(setting: str, value: Any, read: Any) -> None:
    """The error names the setting and the place to correct it."""
    with dask.config.set({f"envship.{setting}": value}), pytest.raises(SettingInvalid) as caught:
        read()
    assert f"envship.{setting}" in str(caught.value)
    assert "DASK_ENVSHIP__" in str(caught.value)
