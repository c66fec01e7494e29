"""The part of Triton's published ``model_config.proto`` that a repository here uses, as a protobuf message class.

Field names and numbers are those of github.com/triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TYPES = (
    "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16",
    "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
)  # fmt: skip
_KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
# Message, then field: number, type, repeated.
_MESSAGES: dict[str, dict[str, tuple[int, str, bool]]] = {
    "ModelInput": {"name": (1, "string", False), "data_type": (2, "DataType", False), "dims": (4, "int64", True)},
    "ModelOutput": {"name": (1, "string", False), "data_type": (2, "DataType", False), "dims": (3, "int64", True)},
    "ModelInstanceGroup": {"name": (1, "string", False), "kind": (4, "Kind", False), "count": (2, "int32", False)},
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "int32", True),
        "max_queue_delay_microseconds": (2, "uint64", False),
    },
    "ModelParameter": {"string_value": (1, "string", False)},
    # A protobuf map is a repeated entry of key and value; the text form is the same.
    "ParametersEntry": {"key": (1, "string", False), "value": (2, "ModelParameter", False)},
    "ModelConfig": {
        "name": (1, "string", False),
        "platform": (2, "string", False),
        "max_batch_size": (4, "int32", False),
        "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True),
        "instance_group": (7, "ModelInstanceGroup", True),
        "default_model_filename": (8, "string", False),
        "dynamic_batching": (11, "ModelDynamicBatching", False),
        "parameters": (14, "ParametersEntry", True),
        "backend": (17, "string", False),
    },
}


def model_config() -> Any:
    """Return an empty ``ModelConfig``."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton_subset.proto", package="inference", syntax="proto3")
    for name, values in (("DataType", _TYPES), ("Kind", _KINDS)):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, (number, kind, repeated) in fields.items():
            made = message.field.add(name=label, number=number)
            made.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in ("DataType", "Kind"):
                made.type, made.type_name = field.TYPE_ENUM, f".inference.{kind}"
            elif kind in _MESSAGES:
                made.type, made.type_name = field.TYPE_MESSAGE, f".inference.{kind}"
            else:
                made.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
