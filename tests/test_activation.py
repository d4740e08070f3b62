from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from worker_bootstrap import activation
from worker_bootstrap.activation import activated
from worker_bootstrap.errors import StartError

USERS_OWN = {"HOME": "/home/me", "OMP_NUM_THREADS": "2", "CONDA_PKGS_DIRS": "/pkgs", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return conda_prefix(tmp_path / "base")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return conda_prefix(tmp_path / "new")


def conda_prefix(path: Path) -> Path:
    (path / "conda-meta").mkdir(parents=True)
    (path / "bin").mkdir()
    return path


def script(prefix: Path, kind: str, name: str, text: str) -> None:
    path = prefix / "etc/conda" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def variables_of(base: Path, **more: str) -> dict[str, str]:
    """Those of a process after ``conda activate base``, with what a user sets."""
    return {
        **USERS_OWN,
        "PATH": f"{base}/bin:/opt/conda/condabin:/usr/local/bin:/usr/bin:/bin",
        "CONDA_PREFIX": str(base),
        "CONDA_DEFAULT_ENV": "base",
        "CONDA_PROMPT_MODIFIER": "(base) ",
        "CONDA_SHLVL": "2",
        "CONDA_PREFIX_1": "/opt/conda",
        "CONDA_EXE": "/opt/conda/bin/conda",
        **more,
    }


def move(
    base: Path, new: Path, variables: Mapping[str, str] | None = None, defined: Mapping[str, str] | None = None
) -> dict[str, str]:
    return activated(variables or variables_of(base), str(new), defined or {}, base_prefixes=[str(base)])


def test_what_conda_activate_would_set_is_set(base: Path, new: Path) -> None:
    assert move(base, new) == {
        **USERS_OWN,
        "PATH": f"{new}/bin:/opt/conda/condabin:/usr/local/bin:/usr/bin:/bin",
        "CONDA_PREFIX": str(new),
        "CONDA_DEFAULT_ENV": str(new),
        "CONDA_PROMPT_MODIFIER": f"({new}) ",
        "CONDA_SHLVL": "1",
        "CONDA_EXE": "/opt/conda/bin/conda",
    }


def test_the_given_variables_are_not_changed(base: Path, new: Path) -> None:
    variables = variables_of(base)
    move(base, new, variables)
    assert variables == variables_of(base)


def test_a_prefix_that_is_no_conda_environment_gets_no_conda_variables(base: Path, tmp_path: Path) -> None:
    found = move(base, tmp_path / "plain")
    assert {name for name in found if name.startswith("CONDA_")} == {"CONDA_EXE", "CONDA_PKGS_DIRS"}
    assert found["VIRTUAL_ENV"] == f"{tmp_path}/plain"
    assert found["PATH"].split(":")[0] == f"{tmp_path}/plain/bin"


def test_a_venv_that_is_left(tmp_path: Path, new: Path) -> None:
    venv = tmp_path / "venv"
    variables = {**USERS_OWN, "PATH": f"{venv}/bin:/usr/bin", "VIRTUAL_ENV": str(venv), "PYTHONHOME": "/usr"}
    found = activated(variables, str(new), {}, base_prefixes=[str(venv), "/usr"])
    assert found["PATH"] == f"{new}/bin:/usr/bin"  # the machine's own folders stay
    assert "VIRTUAL_ENV" not in found and "PYTHONHOME" not in found


def test_path_lists_lose_what_lies_in_the_base_and_keep_the_rest(base: Path, new: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(base)
    found = move(
        base,
        new,
        variables_of(
            base,
            PYTHONPATH=f"/mine:{base}/lib:{tmp_path}/alias/lib",
            LD_LIBRARY_PATH=f"{base}/lib",
            MANPATH=f"{base}/man::/usr/man",
            XDG_DATA_DIRS=f"{base}-other/share",
        ),
    )
    assert found["PYTHONPATH"] == "/mine"
    assert "LD_LIBRARY_PATH" not in found
    assert found["MANPATH"] == ":/usr/man"
    assert found["XDG_DATA_DIRS"] == f"{base}-other/share"


def test_what_leads_into_the_base_goes_whatever_its_name(base: Path, new: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(base)
    into_base = {
        "SSL_CERT_FILE": f"{base}/ssl/cacert.pem",
        "REQUESTS_CA_BUNDLE": f"{tmp_path}/alias/ssl/cacert.pem",
        "QT_PLUGIN_PATH": f"{base}/plugins",
        "LD_PRELOAD": f"{base}/lib/x.so {base}/lib/y.so",
        "CONDA_PYTHON_EXE": f"{base}/bin/python",
        "CONDA_EXE": f"{base}/bin/conda",
        "BASE_ROOT": str(base),
        "LDFLAGS": f"-L{base}/lib -lz",
        "INDEX": f"file://{base}/index",
    }
    assert not into_base.keys() & move(base, new, variables_of(base, **into_base)).keys()


def test_of_lists_of_any_name_what_lies_elsewhere_stays(base: Path, new: Path) -> None:
    lists = {"QT_PLUGIN_PATH": f"{base}/plugins:/mine/plugins", "LD_PRELOAD": f"/mine/x.so {base}/lib/y.so"}
    found = move(base, new, variables_of(base, **lists))
    assert (found["QT_PLUGIN_PATH"], found["LD_PRELOAD"]) == ("/mine/plugins", "/mine/x.so")


def test_what_does_not_lead_into_the_base_stays_as_it_is(base: Path, new: Path) -> None:
    elsewhere = {
        "SSL_CERT_FILE": "/etc/ssl/cert.pem",
        "NEIGHBOUR": f"{base}-other/x",
        "BACKUP": f"/backup{base}/x",
        "FLAGS": f"-L{base}.old/lib -L/backup{base}/lib",
        "LD_PRELOAD": "/mine/x.so /mine/y.so",
        "EMPTY": "",
        "WORDS": "base: of all",
    }
    assert elsewhere.items() <= move(base, new, variables_of(base, **elsewhere)).items()


def test_settings_and_the_place_of_the_process_stay_even_below_the_base(base: Path, new: Path) -> None:
    below = {
        name: f"{base}/{name}"
        for name in ("HOME", "TMPDIR", "PWD", "ENVSHIP_STORE", "DASK_CONFIG", "DASK_ENVSHIP__STORE")
    }
    assert below.items() <= move(base, new, variables_of(base, **below)).items()


def test_marks_of_the_environment_left_are_gone(base: Path, new: Path) -> None:
    found = move(base, new, variables_of(base, ENVSHIP_ENVIRONMENT="0" * 64, ENVSHIP_PREFIX="/x", ENVSHIP_STORE="/s"))
    assert "ENVSHIP_ENVIRONMENT" not in found and "ENVSHIP_PREFIX" not in found
    assert found["ENVSHIP_STORE"] == "/s"


# -- variables that environments define


def test_variables_of_the_environment_win_over_those_of_its_packages(base: Path, new: Path) -> None:
    folder = new / "etc/conda/env_vars.d"
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps({"ONE": "package", "TWO": "package"}))
    (folder / "broken.json").write_text("{")
    found = move(base, new, variables_of(base, GONE="x"), {"TWO": "mine", "GONE": "***unset***"})
    assert (found["ONE"], found["TWO"]) == ("package", "mine")
    assert "GONE" not in found


def test_variables_of_the_base_go_unless_the_user_changed_them(base: Path, new: Path) -> None:
    (base / "conda-meta/state").write_text(json.dumps({"env_vars": {"GDAL_DATA": "/base/gdal", "MODE": "base"}}))
    found = move(base, new, variables_of(base, GDAL_DATA="/base/gdal", MODE="mine"))
    assert "GDAL_DATA" not in found
    assert found["MODE"] == "mine"


# -- scripts


def test_activation_scripts_run_in_order_with_the_new_variables(base: Path, new: Path) -> None:
    script(new, "activate.d", "1.sh", 'echo noise; export PROJ_LIB="$CONDA_PREFIX/share/proj"; A=not-exported')
    script(new, "activate.d", "2.sh", 'export ALL="$PROJ_LIB:$DEFINED"; unset OMP_NUM_THREADS')
    script(new, "activate.d", "3.fish", "export FISH=1")
    found = move(base, new, None, {"DEFINED": "yes"})
    assert found["ALL"] == f"{new}/share/proj:yes"
    assert not {"OMP_NUM_THREADS", "FISH", "A", "envship_script"} & set(found)


def test_the_shell_leaves_no_traces(base: Path, new: Path) -> None:
    variables = variables_of(base, PWD="/old", BASH_ENV="/nowhere", SHLVL="7", ODD="two\nlines = x")
    without_shell = move(base, new, variables, {"ONE": "1"})
    script(new, "activate.d", "1.sh", "export ONE=1")
    assert move(base, new, variables) == without_shell


def test_deactivation_scripts_of_the_base_run_with_its_variables(base: Path, new: Path) -> None:
    script(base, "activate.d", "gdal.sh", 'export GDAL_DATA="$CONDA_PREFIX/gdal"')
    script(base, "deactivate.d", "gdal.sh", 'test "$CONDA_PREFIX" = "$DASK_EXPECTED" && unset GDAL_DATA')
    found = move(base, new, variables_of(base, GDAL_DATA=f"{base}/gdal", DASK_EXPECTED=str(base)))
    assert "GDAL_DATA" not in found
    assert found["DASK_EXPECTED"] == str(base)


def test_what_a_script_of_the_base_set_goes_though_none_unsets_it(base: Path, new: Path) -> None:
    script(base, "activate.d", "gdal.sh", 'export GDAL_DATA="$CONDA_PREFIX/gdal" MODE=base')
    found = move(base, new, variables_of(base, GDAL_DATA=f"{base}/gdal", MODE="mine"))
    assert "GDAL_DATA" not in found
    assert found["MODE"] == "mine"


def test_scripts_of_a_base_that_was_not_activated_do_not_run(base: Path, new: Path) -> None:
    script(base, "deactivate.d", "x.sh", "unset MODE")
    variables = {"PATH": "/usr/bin:/bin", "MODE": "mine"}
    assert move(base, new, variables)["MODE"] == "mine"


def test_a_base_that_cannot_be_deactivated_is_left_all_the_same(
    base: Path, new: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(activation, "SCRIPTS_TIMEOUT_S", 0.3)
    script(base, "deactivate.d", "x.sh", "sleep 60")
    assert move(base, new)["CONDA_PREFIX"] == str(new)
    assert "x.sh" in caplog.text


def test_a_script_that_exits_leaves_what_was_set_before(base: Path, new: Path) -> None:
    script(new, "activate.d", "1.sh", "export ONE=1")
    script(new, "activate.d", "2.sh", "exit 3")
    assert move(base, new)["ONE"] == "1"


def test_a_script_that_hangs_is_ended_with_what_it_started(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "SCRIPTS_TIMEOUT_S", 1.0)
    script(new, "activate.d", "hang.sh", f"echo why it hangs >&2; sleep 3600 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(StartError) as caught:
        move(base, new)
    assert "hang.sh" in str(caught.value) and "why it hangs" in str(caught.value)
    pid = (tmp_path / "pid").read_text().strip()
    state = subprocess.run(["ps", "-o", "state=", "-p", pid], capture_output=True, text=True, check=False).stdout
    assert state.strip() in ("", "Z")


def test_a_script_that_leaves_a_daemon_behind_does_not_hold_us_up(base: Path, new: Path, tmp_path: Path) -> None:
    script(new, "activate.d", "1.sh", f"sleep 3600 & echo $! > {tmp_path}/pid; export ONE=1")
    try:
        assert move(base, new)["ONE"] == "1"
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)


def test_a_shell_that_breaks_is_an_error_with_its_output(base: Path, new: Path) -> None:
    script(new, "activate.d", "1.sh", "echo cannot go on >&2; kill -9 $$")
    with pytest.raises(StartError, match="cannot go on"):
        move(base, new)


def test_a_shell_without_bash(base: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = activation.shutil.which
    monkeypatch.setattr(activation.shutil, "which", lambda name: None if name == "bash" else which(name))
    script(new, "activate.d", "1.sh", "export ONE=1")
    assert move(base, new)["ONE"] == "1"
