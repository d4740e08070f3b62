"""What can be packed: conda environments, venvs and plain interpreters.

`locate` turns what the user wrote into a prefix; `draft` says what a package of it consists of before anything is read;
`conda` and `venv` draw up the plan of a prefix; `tree` walks. Nothing here reads the content of files that go into the
environment, or writes anything.
"""
