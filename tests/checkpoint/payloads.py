"""Twenty-five ways in which a file may ask its reader to run something; each would leave a file behind."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from functools import partial

import numpy as np
import torch


class Calls:
    """Unpickles as the result of a call."""

    def __init__(self, function, *args):
        self._call = function, args

    def __reduce__(self):
        return self._call


def torch_file(payload, **options):
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


def numpy_file(payload):
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def numpy_archive(payload):
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([payload], dtype=object))
    return buffer.getvalue()


def zip_file(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_file(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def safetensors_file(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def payloads(trap):
    """The contents, by what they are; `trap` is the path that any of them would make."""
    trap = str(trap)
    code = f"open({trap!r}, 'w')"
    makes = Calls(os.mkdir, trap)
    runs = Calls(os.system, f"touch {trap}")
    evaluates = Calls(eval, code)
    opcodes = f"cos\nmkdir\n(S'{trap}'\ntR.".encode()
    pickled = pickle.dumps(makes)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {
        **{f"pickle of protocol {protocol}": pickle.dumps(makes, protocol=protocol) for protocol in range(6)},
        "pickle that runs a command": pickle.dumps(runs),
        "pickle that evaluates": pickle.dumps(evaluates),
        "pickle that executes": pickle.dumps(Calls(exec, code)),
        "pickle in a dictionary": pickle.dumps({"state": {"w": makes}, "version": 2}),
        "pickle of a partial": pickle.dumps(Calls(partial, os.mkdir, trap)),
        "pickle written by hand": opcodes,
        "pickle after JSON": b'{"version": 2}\n' + pickled,
        "torch file": torch_file({"module": makes}),
        "torch file of the older kind": torch_file(makes, _use_new_zipfile_serialization=False),
        "torch file that evaluates": torch_file([torch.ones(2), evaluates]),
        "numpy file": numpy_file(makes),
        "numpy archive": numpy_archive(makes),
        "zip of a module": zip_file({"__main__.py": code, "data.pkl": pickled}),
        "tar that leads out": tar_file("../../ran", pickled),
        "python": f"import os\n{code}\n".encode(),
        "shell": f"#!/bin/sh\ntouch {trap}\n".encode(),
        "YAML": f"!!python/object/apply:os.mkdir ['{trap}']\n".encode(),
        "JSON that names a class": json.dumps(
            {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [trap]}], "_CLASS_": "os.system", "args": [trap]}
        ).encode(),
        "safetensors with a pickle in it": safetensors_file(
            {"__metadata__": {"numbers": pickled.hex(), "__reduce__": code}, "x": entry}, pickled[:4]
        ),
    }
