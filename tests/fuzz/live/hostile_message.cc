#include "tests/fuzz/live/hostile_message.h"

#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"

namespace headstart::testing {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr uint64_t kIntegers[] = {
    0,       1,        2,          7,          127,        128,        255,        256,  257,
    1 << 16, 1u << 31, 0x7fffffff, 0xffffffff, 0xfffffffe, 1ull << 32, 1ull << 63, ~0ull};
constexpr double kNumbers[] = {0.0,
                               -0.0,
                               0.5,
                               1.0,
                               1.0000001,
                               -1.0,
                               1e-40,
                               3e38,
                               std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()};
constexpr int64_t kLengths[] = {0, 1, 15, 16, 17, 64, 65, 128, 129, 4096, 4097, 40000};
constexpr char kTexts[] = "a%n{}\"\\\r\n\t\x01/.:; ";

std::string HostileText(Random& random) {
  std::string text(static_cast<size_t>(OneOf(random, kLengths)), 'x');
  for (int i = 0; i < 8 && !text.empty(); ++i) {
    text[random.Between(0, std::ssize(text) - 1)] = kTexts[random.Between(0, sizeof(kTexts) - 2)];
  }
  return text;
}

// Sets or, of a repeated field, adds.
void SetHostile(Random& random, const FieldDescriptor* field, Message* message) {
  const Reflection* access = message->GetReflection();
  const bool many = field->is_repeated();
  const uint64_t integer = OneOf(random, kIntegers);
  const double number = OneOf(random, kNumbers);
#define HEADSTART_SET(Type, value)                       \
  do {                                                   \
    if (many) access->Add##Type(message, field, value);  \
    if (!many) access->Set##Type(message, field, value); \
  } while (false)
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      HEADSTART_SET(Int32, static_cast<int32_t>(integer));
      break;
    case FieldDescriptor::CPPTYPE_INT64:
      HEADSTART_SET(Int64, static_cast<int64_t>(integer));
      break;
    case FieldDescriptor::CPPTYPE_UINT32:
      HEADSTART_SET(UInt32, static_cast<uint32_t>(integer));
      break;
    case FieldDescriptor::CPPTYPE_UINT64:
      HEADSTART_SET(UInt64, integer);
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      HEADSTART_SET(Double, number);
      break;
    case FieldDescriptor::CPPTYPE_FLOAT:
      HEADSTART_SET(Float, static_cast<float>(number));
      break;
    case FieldDescriptor::CPPTYPE_BOOL:
      HEADSTART_SET(Bool, random.Percent(50));
      break;
    case FieldDescriptor::CPPTYPE_ENUM:
      HEADSTART_SET(EnumValue, static_cast<int>(integer));
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      HEADSTART_SET(String, HostileText(random));
      break;
    case FieldDescriptor::CPPTYPE_MESSAGE:
      SpoilFields(
          random, 50,
          many ? access->AddMessage(message, field) : access->MutableMessage(message, field));
      break;
  }
#undef HEADSTART_SET
}

std::string Varint(uint64_t value) {
  std::string out;
  for (; value >= 128; value >>= 7) out.push_back(static_cast<char>(value | 128));
  out.push_back(static_cast<char>(value));
  return out;
}

// What no field of ours looks like.
std::string StrangeField(Random& random) {
  switch (random.Between(0, 5)) {
    case 0:
      return absl::StrCat(Varint(536870911 << 3 | 2), Varint(3), "abc");  // the largest number
    case 1:
      return Varint(uint64_t{1000} << 3 | random.Between(3, 7));  // groups, types that are none
    case 2:
      return absl::StrCat(Varint(3 << 3 | 2), Varint(0x7fffffff));  // longer than what follows
    case 3:
      return absl::StrCat(Varint(9 << 3), std::string(11, '\xff'));  // more than 64 bits
    case 4:
      return std::string(500, '\x0b');  // groups in groups
    default:
      return std::string(1, '\0');  // field 0
  }
}

}  // namespace

void SpoilFields(Random& random, int64_t percent, Message* message) {
  const auto* type = message->GetDescriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    if (!random.Percent(percent)) continue;
    const int64_t times = type->field(i)->is_repeated() ? random.Between(1, 70) : 1;
    for (int64_t k = 0; k < times; ++k) SetHostile(random, type->field(i), message);
  }
}

std::string SpoilBytes(Random& random, int64_t percent, std::string bytes) {
  while (random.Percent(percent)) {
    const int64_t at = random.Between(0, std::ssize(bytes));
    const auto position = static_cast<size_t>(at);
    switch (random.Between(0, 4)) {
      case 0:
        bytes.resize(position);
        break;
      case 1:
        if (position < bytes.size()) bytes[position] = static_cast<char>(random.Between(0, 255));
        break;
      case 2:
        bytes.insert(position, bytes.substr(static_cast<size_t>(random.Between(0, at))));
        break;
      default:
        bytes.insert(random.Percent(50) ? bytes.size() : position, StrangeField(random));
    }
    if (bytes.size() > 1 << 18) break;
  }
  return bytes;
}

}  // namespace headstart::testing
