"""Bounds the size of a Protocol Buffers message before it is parsed.

A parsed message may need a hundred times the memory of its bytes: two bytes are an empty node. So the encoding
(https://protobuf.dev/programming-guides/encoding) is walked first, without building anything.
"""

from __future__ import annotations

from typing import Any

from tvm_attn.errors import OnnxError

MAX_FIELDS = 2_000_000
"""Most fields of all messages in a file; GPT-2 XL with the stack traces of PyTorch's exporter has 200,000."""
MAX_DEPTH = 64
_MAX_TEXT = 64 << 20  # bytes of all names, texts and lists of integers
_MAX_VARINTS = 512 << 20  # bytes of tensors that are stored as lists of integers
_STRING, _MESSAGE = 9, 11
# Fields of TensorProto that need as much memory parsed as encoded: float_data, raw_data, double_data.
_FLAT, _INTEGERS = (4, 9, 10), (5, 7, 11)


def check_message(buffer: memoryview, descriptor: Any, what: str) -> None:
    """Walks an encoded message.

    Args:
        buffer: the bytes.
        descriptor: of the message's type.
        what: names the file in messages.

    Raises:
        OnnxError: it is truncated, malformed, or larger than any model needs.
    """
    _Walk(buffer, what).message(0, len(buffer), descriptor, 0)


class _Walk:
    def __init__(self, buffer: memoryview, what: str) -> None:
        self._buffer, self._what = buffer, what
        self._fields = self._text = self._varints = 0
        self._known: dict[str, dict[int, Any]] = {}

    def message(self, at: int, end: int, descriptor: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise OnnxError(f"{self._what} is nested more than {MAX_DEPTH} deep, which no model needs")
        known = self._known.get(descriptor.full_name)
        if known is None:
            known = {field.number: field for field in descriptor.fields}
            self._known[descriptor.full_name] = known
        is_tensor = descriptor.name == "TensorProto"
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise OnnxError(f"{self._what} has more than {MAX_FIELDS} fields, more than any model needs")
            start = at
            tag, at = self._varint(at, end)
            kind, number = tag & 7, tag >> 3
            if kind == 0:
                _, at = self._varint(at, end)
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            elif kind == 2:
                size, at = self._varint(at, end)
                if size > end - at:
                    raise self._damaged(start)
                field = known.get(number)
                if field is not None and field.type == _MESSAGE:
                    self.message(at, at + size, field.message_type, depth + 1)
                elif not (is_tensor and number in _FLAT):
                    self._count(size, is_tensor and number in _INTEGERS)
                    if field is not None and field.type == _STRING:
                        self._check_text(at, at + size)
                at += size
            else:
                raise self._damaged(start)
        if at > end:
            raise self._damaged(end)

    def _count(self, size: int, integers: bool) -> None:
        if integers:
            self._varints += size
        else:
            self._text += size
        if self._varints > _MAX_VARINTS or self._text > _MAX_TEXT:
            raise OnnxError(
                f"{self._what} has more names and lists of integers than any model needs; store weights as raw data"
            )

    def _check_text(self, at: int, end: int) -> None:
        """protobuf gives names that are no UTF-8 as bytes, which nobody expects."""
        try:
            bytes(self._buffer[at:end]).decode()
        except UnicodeDecodeError:
            raise self._damaged(at) from None

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        first = at
        while at < end and shift < 70:
            byte = self._buffer[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7
        raise self._damaged(first)

    def _damaged(self, at: int) -> OnnxError:
        return OnnxError(f"{self._what} is no ONNX file, or it is cut off or damaged (at byte {at}); get it anew")
