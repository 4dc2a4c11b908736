"""Damaged and hostile files for everything of metabook that reads one.

    make fuzz                                          every target for a minute
    make fuzz ARGS="--seconds 600 --only config"       one of them for ten

A target (`fuzz.targets`) is a reader of the library and what its documentation says that it raises.  It is given bytes,
as a file or a folder of its own.  It fails when anything else is raised, when an error does not name the file, when it
needs more than ten seconds or the target's bound of memory, when it writes outside its folder, starts a program, opens a
connection or unpickles.

The fuzzer is atheris, which looks for bytes that lead through new parts of the code.  It starts from small valid files,
which `fuzz.seeds` makes, and keeps what it learned in `build/fuzz/NAME`; `build/fuzz/NAME.log` is its report.  Where a
format has an inner structure (JSON), `fuzz.mutations` also changes that.

What is found is written down in base64.  Mend the reader, and add the bytes to the table in
`tests/system/test_fuzzed.py`: it also gives every target a few random changes of its seeds, without atheris.
"""
