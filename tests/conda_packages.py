"""``python conda_packages.py FOLDER PREFIX… [--channel URL --spec SPEC…]``: true conda packages from source, and
environments made of them; or of those of another channel.

rattler-build makes the packages (with conda's long placeholder, ``paths.json`` and all), rattler installs them; both
are libraries on PyPI, so that no conda, channel or compiler is needed. The package ``python`` is the interpreter that
runs this. The others have one of everything that relocation meets: binary files (a compiled library, where there is a
compiler), text files, scripts, a module, a chain of links, a link to a folder, a ``noarch: python`` package with an
entry point, an activation script.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHORT = f"{sys.version_info.major}.{sys.version_info.minor}"
FULL = ".".join(map(str, sys.version_info[:3]))
LIBRARY = f"lib/python{SHORT}"
UNNEEDED = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "tkinter",
    "ensurepip",
    "lib2to3",
)

INTERPRETER = r"""
set -e
mkdir -p "$PREFIX/bin" "$PREFIX/{library}/site-packages"
cp -L "{executable}" "$PREFIX/bin/python{short}"
ln -s python{short} "$PREFIX/bin/python"
ln -s python{short} "$PREFIX/bin/python3"
tar -C "{stdlib}" {exclude} --exclude=__pycache__ --exclude='*.a' --exclude='config-*' -chf - . \
  | tar -C "$PREFIX/{library}" -xf -
echo 'packages go here' > "$PREFIX/{library}/site-packages/README.txt"
ln -sfn site-packages "$PREFIX/{library}/dist-packages"
if [ -e "{libpython}" ]; then cp -L "{libpython}" "$PREFIX/lib/"; fi
"{patchelf}" --force-rpath --set-rpath '$ORIGIN/../lib' "$PREFIX/bin/python{short}"
find "$PREFIX/{library}" -name '_sysconfigdata*.py' -exec sed -i "s|{base}/lib|$PREFIX/lib|g" {{}} +
"$PREFIX/bin/python" -m compileall -q "$PREFIX/{library}"
"""

LIBMINI = r"""
set -e
mkdir -p $PREFIX/lib $PREFIX/bin $PREFIX/share/libmini $PREFIX/etc/conda/activate.d
printf '\177MINI\000\001%s/share:%s/lib\000tail\000' "$PREFIX" "$PREFIX" > $PREFIX/lib/libmini.so.1.0.0
ln -s libmini.so.1.0.0 $PREFIX/lib/libmini.so.1
ln -s libmini.so.1 $PREFIX/lib/libmini.so
printf '\177MINI\000\001at the end: %s/end' "$PREFIX" > $PREFIX/share/libmini/end.bin
if command -v cc > /dev/null; then
  printf 'const char *place(void) { return "%s/share:%s/lib"; }\n' "$PREFIX" "$PREFIX" > place.c
  cc -shared -fPIC -o $PREFIX/lib/libplace.so place.c
fi
printf '[libmini]\nprefix=%s\n' "$PREFIX" > $PREFIX/share/libmini/libmini.conf
mkdir -p $PREFIX/share/libmini/data/deep
printf 'kept in %s\n' "$PREFIX" > $PREFIX/share/libmini/data/deep/table.txt
ln -s ../share/libmini/data $PREFIX/lib/minidata
mkdir -p $PREFIX/lib/pkgconfig
printf 'prefix=%s\nName: libmini\n' "$PREFIX" > $PREFIX/lib/pkgconfig/libmini.pc
printf '#!%s/bin/python -I\nimport sys\nprint(sys.prefix, sys.flags.isolated)\n' "$PREFIX" > $PREFIX/bin/mini-isolated
printf '#!%s/bin/mini-prefix -x\n' "$PREFIX" > $PREFIX/bin/mini-other
chmod +x $PREFIX/bin/mini-isolated $PREFIX/bin/mini-other
printf '#!%s/bin/python\nimport sys\nprint(sys.prefix, *sys.argv[1:2])\n' "$PREFIX" > $PREFIX/bin/mini-prefix
chmod +x $PREFIX/bin/mini-prefix
ln -s mini-prefix $PREFIX/bin/mini-alias
printf 'export LIBMINI_DATA=%s/share/libmini\n' "$PREFIX" > $PREFIX/etc/conda/activate.d/libmini.sh
mkdir -p $PREFIX/{library}/site-packages/libmini
printf 'VERSION = "1.0"\n' > $PREFIX/{library}/site-packages/libmini/__init__.py
printf 'PREFIX = "%s"\n' "$PREFIX" > $PREFIX/{library}/site-packages/libmini/config.py
$PREFIX/bin/python -m compileall -q $PREFIX/{library}/site-packages/libmini
"""

NOARCH = r"""
set -e
mkdir -p $SP_DIR/mininoarch
printf 'import sys\n\n\ndef main():\n    print("mininoarch", sys.prefix)\n' > $SP_DIR/mininoarch/__init__.py
"""


def build(channel: Path, name: str, version: str, script: str, requirements: dict[str, Any], **options: Any) -> None:
    """Build one package into *channel*."""
    from rattler_build import PlatformConfig, RenderConfig, Stage0Recipe, ToolConfiguration, VariantConfig

    recipe = {
        "package": {"name": name, "version": version},
        "build": {"number": 0, "script": [script], "dynamic_linking": {"binary_relocation": False}, **options},
        "requirements": requirements,
    }
    folder = channel.parent / "recipes" / name
    folder.mkdir(parents=True)
    rendered = Stage0Recipe.from_dict(recipe, recipe_dir=folder).render(
        VariantConfig(), RenderConfig(PlatformConfig(target_platform="linux-64"))
    )
    for variant in rendered:
        variant.run_build(
            ToolConfiguration(),
            output_dir=channel,
            channels=[channel.as_uri()],
            package_format="conda:1",
            no_include_recipe=True,
        )


def build_all(channel: Path) -> None:
    """Build the three packages."""
    for subdir in ("noarch", "linux-64"):
        (channel / subdir).mkdir(parents=True)
        empty = {"info": {"subdir": subdir}, "packages": {}, "packages.conda": {}, "repodata_version": 1}
        (channel / subdir / "repodata.json").write_text(json.dumps(empty))
    libpython = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("INSTSONAME")))
    interpreter = INTERPRETER.format(
        short=SHORT,
        library=LIBRARY,
        executable=os.path.realpath(sys.executable),
        stdlib=sysconfig.get_path("stdlib"),
        exclude=" ".join(f"--exclude={name}" for name in UNNEEDED),
        libpython=libpython if sysconfig.get_config_var("Py_ENABLE_SHARED") else "",
        patchelf=Path(sysconfig.get_path("scripts")) / "patchelf",
        base=sys.base_prefix,
    )
    own_code = {"skip_pyc_compilation": ["**/*.py"]}
    build(channel, "python", FULL, interpreter, {}, python=own_code)
    pinned = f"python {SHORT}.*"
    libmini = LIBMINI.replace("{library}", LIBRARY)
    build(channel, "libmini", "1.0", libmini, {"host": [pinned], "run": [pinned]}, python=own_code)
    entry = {"entry_points": ["mininoarch = mininoarch:main"]}
    build(
        channel, "mininoarch", "1.0", NOARCH, {"host": [pinned], "run": ["python >=3.9"]}, noarch="python", python=entry
    )


async def install_all(channel: str, specs: Sequence[str], folder: Path, prefixes: Sequence[Path]) -> None:
    """Install packages of *channel* at each prefix; each has a package cache of its own, as on another machine."""
    from rattler import install, solve

    records = await solve(sources=[channel], specs=list(specs), platforms=["linux-64", "noarch"])
    for number, prefix in enumerate(prefixes):
        cache = folder / f"pkgs{number}"
        await install(records, target_prefix=prefix, cache_dir=cache, show_progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prefixes", type=Path, nargs="+")
    parser.add_argument("--channel")
    parser.add_argument("--spec", action="append")
    options = parser.parse_args()
    if options.channel is None:
        own = options.folder / "channel"
        build_all(own)
        specs = [f"python {SHORT}.*", "libmini", "mininoarch"]
        asyncio.run(install_all(own.as_uri(), specs, options.folder, options.prefixes))
        compile_noarch(options.prefixes)
    else:
        channel = indexed(options.channel, options.folder)
        asyncio.run(install_all(channel, options.spec, options.folder, options.prefixes))
    sys.stdout.flush()
    # py-rattler's threads may crash an interpreter that ends in the ordinary way.
    os._exit(0)


def indexed(channel: str, folder: Path) -> str:
    """The URL of *channel*; of a copy below *folder*, with an index, where it is a folder of packages without one."""
    if "://" in channel:
        return channel
    packages = Path(channel).resolve()
    if not (packages / "noarch" / "repodata.json").exists():
        from rattler.index import index_fs

        packages = Path(shutil.copytree(packages, folder / "channel"))
        asyncio.run(index_fs(packages, write_zst=False, write_shards=False))
    return packages.as_uri()


def compile_noarch(prefixes: Sequence[Path]) -> None:
    """Compile the modules of our ``noarch: python`` package in each of *prefixes*."""
    for prefix in prefixes:
        # As conda does after it has linked a noarch package.
        compile_all = [str(prefix / "bin" / "python"), "-m", "compileall", "-q", f"{LIBRARY}/site-packages/mininoarch"]
        subprocess.run(compile_all, cwd=prefix, check=True)


if __name__ == "__main__":
    main()
