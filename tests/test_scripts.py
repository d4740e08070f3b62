"""Scripts in one spelling, whoever wrote them; what a person wrote stays."""

from __future__ import annotations

import pytest

from envship.canonical import PLACEHOLDER, Own
from envship.scripts import Script
from worker_bootstrap.manifest import Relocation

HERE = "/home/me/env"
PIP_24 = (
    "import sys\nfrom a.b import c\nif __name__ == '__main__':\n    sys.argv[0] = sys.argv[0].removesuffix('.exe')\n"
)
INSTALLERS = {
    "distlib": "# -*- coding: utf-8 -*-\nimport re\nimport sys\nfrom a.b import c\nif __name__ == '__main__':\n"
    "    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])\n    sys.exit(c.d())\n",
    "installer": "# -*- coding: utf-8 -*-\nimport re\nimport sys\nfrom a.b import c\n"
    'if __name__ == "__main__":\n    sys.argv[0] = re.sub(r"(-script\\.pyw|\\.exe)?$", "", sys.argv[0])\n'
    "    sys.exit(c.d())\n",
    "conda": "# -*- coding: utf-8 -*-\nimport re\nimport sys\n\nfrom a.b import c\n\nif __name__ == '__main__':\n"
    "    sys.argv[0] = re.sub(r'(-script\\.pyw?|\\.exe)?$', '', sys.argv[0])\n    sys.exit(c.d())\n",
    "rattler": "# -*- coding: utf-8 -*-\nimport re\nimport sys\n\nfrom a.b import c\n\nif __name__ == '__main__':\n"
    "\tsys.argv[0] = re.sub(r'(-script\\.pyw?|\\.exe)?$', '', sys.argv[0])\n\tsys.exit(c.d())\n",
    "pip": PIP_24 + "    sys.exit(c.d())\n",
    "uv": '# -*- coding: utf-8 -*-\nimport sys\nfrom a.b import c\nif __name__ == "__main__":\n'
    '    if sys.argv[0].endswith("-script.pyw"):\n        sys.argv[0] = sys.argv[0][:-11]\n'
    '    elif sys.argv[0].endswith(".exe"):\n        sys.argv[0] = sys.argv[0][:-4]\n    sys.exit(c.d())\n',
}


@pytest.mark.parametrize("python", ["python", "python3", "python3.11"])
@pytest.mark.parametrize("installer", INSTALLERS)
def test_a_script_of_an_entry_point_is_the_same_whoever_wrote_it(installer: str, python: str) -> None:
    content = Script(Own((HERE,), "bin/x"), "python3.11")(f"#!{HERE}/bin/{python}\n{INSTALLERS[installer]}".encode())
    assert content.relocation == Relocation("text", PLACEHOLDER)
    first, *body = content.data.decode().splitlines()
    assert first == f"#!{PLACEHOLDER}/bin/python"
    assert body == ["import sys", "from a.b import c", "if __name__ == '__main__':", "    sys.exit(c.d())"]


@pytest.mark.parametrize(
    "body",
    [
        PIP_24 + "    print('mine')\n    sys.exit(c.d())\n",
        PIP_24 + "    sys.exit(c.d())  # mine\n",
        PIP_24 + "    sys.exit(other.d())\n",
        "# mine\n" + PIP_24 + "    sys.exit(c.d())\n",
        "print('no entry point')\n",
    ],
)
def test_what_a_person_wrote_into_a_script_stays(body: str) -> None:
    script = Script(Own((HERE,), "bin/x"), "python3.11")
    content = script(f"#!{HERE}/bin/python3.11 -u\n{body}".encode())
    assert content.data.decode() == f"#!{PLACEHOLDER}/bin/python -u\n{body}"


@pytest.mark.parametrize("first", ["#!/usr/bin/env python", f"#!{HERE}/bin/python3.9", f"#!{HERE}/bin/perl"])
def test_a_script_of_another_interpreter_keeps_it(first: str) -> None:
    text = f"{first}\n{INSTALLERS['pip']}"
    content = Script(Own((HERE,), "bin/x"), "python3.11")(text.encode())
    assert content.data.decode() == text.replace(HERE, PLACEHOLDER)
