"""Messages between the checker and the process that holds an answer: a length, then tensors, numbers and strings.

Read with `weights_only`, so that bytes from an answer's process can never run code in the checker.
"""

import io
import struct
from typing import BinaryIO

import torch

from vlm_course.grading.compare import Opaque

_LENGTH = struct.Struct("<Q")
_LARGEST = 1 << 30


def send(stream: BinaryIO, message: dict) -> None:
    """Write one message."""
    buffer = io.BytesIO()
    torch.save(_packed(message), buffer)
    stream.write(_LENGTH.pack(buffer.tell()) + buffer.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> dict:
    """Read one message. EOFError when the other side is gone or writes something else."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length) if length <= _LARGEST else b""
    if len(body) < length:
        raise EOFError
    try:
        message = torch.load(io.BytesIO(body), weights_only=True)
    except Exception:
        raise EOFError from None
    if not isinstance(message, dict):
        raise EOFError
    return _unpacked(message)


def _packed(value):
    if isinstance(value, Opaque):
        return {"__opaque__": value.kind}
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_packed(item) for item in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def _unpacked(value):
    if isinstance(value, dict):
        if value.keys() == {"__opaque__"}:
            return Opaque(str(value["__opaque__"]))
        return {key: _unpacked(item) for key, item in value.items()}
    return type(value)(_unpacked(item) for item in value) if isinstance(value, tuple | list) else value
