"""Wire formats as they were released, and what must be true of the present one."""

import pathlib

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

KEPT = sorted((pathlib.Path(__file__).resolve().parents[1] / "wire").glob("*.binpb"))
FILE = "headstart/v1/prefill.proto"


def descriptor_set(path):
    return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())


def file_of(descriptors):
    (found,) = [file for file in descriptors.file if file.name == FILE]
    return found


def messages(descriptors):
    """Full name -> class, of a program that knows only this format."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.Add(file)
    names = [message.name for message in file_of(descriptors).message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"headstart.v1.{name}")) for name in names}


def _all_messages(messages, prefix=""):
    for message in messages:
        yield prefix + message.name, message
        yield from _all_messages(message.nested_type, f"{prefix}{message.name}.")


def _all_enums(file):
    yield from ((enum.name, enum) for enum in file.enum_type)
    for name, message in _all_messages(file.message_type):
        yield from ((f"{name}.{enum.name}", enum) for enum in message.enum_type)


def breaks(old, new):
    """What a program with the old format would misunderstand in the new one, in words."""
    found = []
    new_messages = dict(_all_messages(new.message_type))
    for name, message in _all_messages(old.message_type):
        fields = {field.number: field for field in new_messages[name].field} if name in new_messages else {}
        for field in message.field:
            same = fields.get(field.number)
            if same is None or any(getattr(field, part) != getattr(same, part) for part in ("name", "type", "label", "type_name")):
                found.append(f"{name}.{field.name} = {field.number}")
    new_enums = dict(_all_enums(new))
    for name, enum in _all_enums(old):
        values = {value.name: value.number for value in new_enums[name].value} if name in new_enums else {}
        found += [f"{name}.{value.name} = {value.number}" for value in enum.value if values.get(value.name) != value.number]
    methods = {f"{service.name}.{method.name}": method for service in new.service for method in service.method}
    for service in old.service:
        found += [f"{service.name}.{method.name}" for method in service.method
                  if methods.get(f"{service.name}.{method.name}") != method]
    return found
