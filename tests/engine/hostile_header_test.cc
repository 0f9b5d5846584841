// Safetensors headers that lie.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/engine/victim.h"

namespace headstart {
namespace {

using nlohmann::json;

class HostileHeaderTest : public HostileModelTest {};
TEST_P(HostileHeaderTest, IsRefused) { Expect(/*num_shards=*/1); }

// The header without the braces around it, to put something before or behind.
inline void PutFirst(std::string& header, const std::string& entry) {
  header.insert(1, entry + ",");
}

// A change of one field of one tensor's entry.
std::function<void(const Victim&)> SetField(const char* tensor, const char* field,
                                            const json& value) {
  return
      [=](const Victim& v) { v.EditHeader([&](json& header) { header[tensor][field] = value; }); };
}

std::function<void(const Victim&)> Text(const std::function<void(std::string&)>& change) {
  return [=](const Victim& v) { v.EditHeaderText(change); };
}

INSTANTIATE_TEST_SUITE_P(
    Size, HostileHeaderTest,
    ::testing::Values(
        Case{"Empty", [](const Victim& v) { v.Write(kSingle, ""); }, kSingle, "empty file"},
        Case{"SevenBytes", [](const Victim& v) { v.Write(kSingle, "1234567"); }, kSingle,
             "7 bytes are no safetensors file"},
        Case{"NoHeader", [](const Victim& v) { v.Write(kSingle, LengthBytes(0)); }, kSingle,
             "does not begin with {"},
        Case{"LengthOfAllOnes",
             [](const Victim& v) {
               v.Edit(kSingle, [](std::string& f) { f.replace(0, 8, LengthBytes(~0ull)); });
             },
             kSingle, "header of 18446744073709551615 bytes"},
        Case{"LengthBeyondTheFile",
             [](const Victim& v) {
               v.Edit(kSingle, [](std::string& f) { f.replace(0, 8, LengthBytes(f.size() - 7)); });
             },
             kSingle, "truncated?"},
        Case{"HeaderOf33MiB",
             [](const Victim& v) {
               v.WriteSparse(kSingle, LengthBytes(33 << 20) + "{", int64_t{1} << 30);
             },
             kSingle, "header of 34603008 bytes, limit"},
        Case{"HeaderOf31MiBOfZeros",
             [](const Victim& v) {
               v.WriteSparse(kSingle, LengthBytes(31 << 20), int64_t{1} << 30);
             },
             kSingle, "does not begin with {"},
        Case{"HeaderOf31MiBOfZerosBehindABrace",
             [](const Victim& v) {
               v.WriteSparse(kSingle, LengthBytes(31 << 20) + "{", int64_t{1} << 30);
             },
             kSingle, "not JSON"},
        Case{"TruncatedByOne",
             [](const Victim& v) { v.Edit(kSingle, [](std::string& f) { f.pop_back(); }); },
             kSingle, kNorm},
        Case{"TruncatedInTheHeader",
             [](const Victim& v) { v.Edit(kSingle, [](std::string& f) { f.resize(100); }); },
             kSingle, "truncated?"},
        Case{"LongerByOne",
             [](const Victim& v) { v.Edit(kSingle, [](std::string& f) { f.push_back('\0'); }); },
             kSingle, "1 bytes behind the last tensor"}),
    CaseName);

INSTANTIATE_TEST_SUITE_P(
    Json, HostileHeaderTest,
    ::testing::Values(
        Case{"NotJson", Text([](std::string& h) { h = "{model: weights}"; }), kSingle, "not JSON"},
        Case{"CutOff", Text([](std::string& h) { h.resize(h.rfind('}')); }), kSingle, "not JSON"},
        Case{"TrailingGarbage", Text([](std::string& h) { h += "}"; }), kSingle, "not JSON"},
        Case{"Array", Text([](std::string& h) { h = "[]"; }), kSingle, "does not begin with {"},
        Case{"MillionBrackets",
             Text([](std::string& h) { h = "{\"a\":" + std::string(1'000'000, '['); }), kSingle,
             "nested deeper than 32"},
        Case{"MillionTensors", Text([](std::string& h) {
               std::string many;
               for (int i = 0; i < 1'000'000; ++i) many += "\"" + std::to_string(i) + "\":0,";
               PutFirst(h, many + "\"last\":0");
             }),
             kSingle, "more than 500000 values"},
        Case{"DuplicateTensor",
             Text([](std::string& h) { PutFirst(h, std::string("\"") + kNorm + "\":{}"); }),
             kSingle, kNorm},
        Case{"DuplicateField", Text([](std::string& h) {
               ReplaceFirst(h, "\"shape\":", "\"dtype\":\"BF16\",\"shape\":");
             }),
             kSingle, "duplicate key \"dtype\""},
        Case{"BadUtf8", Text([](std::string& h) { PutFirst(h, "\"\xff\xfe\":{}"); }), kSingle,
             "not JSON"},
        Case{"ControlCharacter", Text([](std::string& h) { PutFirst(h, "\"a\nb\":{}"); }), kSingle,
             "not JSON"},
        Case{"NumberOutOfRange", Text([](std::string& h) {
               ReplaceFirst(h, "\"data_offsets\":[0,", "\"data_offsets\":[1e999,");
             }),
             kSingle, "not JSON"},
        Case{"MetadataIsAList", Text([](std::string& h) { PutFirst(h, "\"__metadata__\":[1]"); }),
             kSingle, "__metadata__"},
        Case{"MetadataHoldsANumber",
             Text([](std::string& h) { PutFirst(h, "\"__metadata__\":{\"format\":1}"); }), kSingle,
             "__metadata__"},
        Case{"NameOfAThousandBytes",
             Text([](std::string& h) { PutFirst(h, "\"" + std::string(1000, 'n') + "\":{}"); }),
             kSingle, "name of 1000 bytes"},
        Case{"EmptyName", Text([](std::string& h) { PutFirst(h, "\"\":{}"); }), kSingle,
             "name of 0 bytes"}),
    CaseName);

INSTANTIATE_TEST_SUITE_P(
    Entry, HostileHeaderTest,
    ::testing::Values(
        Case{"EntryIsANumber",
             [](const Victim& v) { v.EditHeader([](json& h) { h[kNorm] = 7; }); }, kSingle, kNorm},
        Case{"NoDType", SetField(kNorm, "dtype", nullptr), kSingle, kNorm},
        Case{"NoShape", SetField(kNorm, "shape", nullptr), kSingle, kNorm},
        Case{"NoOffsets", SetField(kNorm, "data_offsets", nullptr), kSingle, kNorm},
        Case{"UnknownDType", SetField(kNorm, "dtype", "BF17"), kSingle, kNorm},
        Case{"DTypeIsANumber", SetField(kNorm, "dtype", 16), kSingle, kNorm},
        Case{"ShapeIsAString", SetField(kNorm, "shape", "64"), kSingle, kNorm},
        Case{"NegativeDimension", SetField(kNorm, "shape", {-64}), kSingle, kNorm},
        Case{"TwoNegativeDimensions", SetField(kUp, "shape", {-96, -64}), kSingle, kUp},
        Case{"FractionalDimension", SetField(kNorm, "shape", {64.5}), kSingle, kNorm},
        Case{"ZeroDimension", SetField(kNorm, "shape", {64, 0}), kSingle, kNorm},
        Case{"ProductOverflows", SetField(kUp, "shape", {1ll << 32, 1ll << 32}), kSingle,
             "up_proj.weight\": shape is too large"},
        Case{"ProductWrapsToTheRightSize", SetField(kNorm, "shape", {(1ll << 62) + 16, 4}), kSingle,
             "norm.weight\": shape is too large"},
        Case{"DimensionOf64Bits", SetField(kNorm, "shape", {18446744073709551615ull}), kSingle,
             kNorm},
        Case{"BytesOverflow", SetField(kNorm, "shape", {1ll << 56, 1}), kSingle, kNorm},
        Case{"NegativeOffset", SetField(kNorm, "data_offsets", {-128, 0}), kSingle, kNorm},
        Case{"ReversedOffsets", SetField(kNorm, "data_offsets", {128, 0}), kSingle, kNorm},
        Case{"ThreeOffsets", SetField(kNorm, "data_offsets", {0, 64, 128}), kSingle, kNorm},
        Case{"OffsetsBeyondTheFile", SetField(kNorm, "data_offsets", {1 << 30, (1 << 30) + 128}),
             kSingle, kNorm},
        Case{"OffsetsNearTheLimit",
             SetField(kNorm, "data_offsets", {9223372036854775679ll, 9223372036854775807ll}),
             kSingle, kNorm},
        Case{"RangeLargerThanTheShape", SetField(kNorm, "shape", {63}), kSingle, kNorm},
        Case{"Overlap", [](const Victim& v) {
               v.EditHeader([](json& h) {
                 for (auto& offset : h[kNorm]["data_offsets"]) offset = offset.get<int64_t>() - 2;
               });
             },
             kSingle, "overlaps"},
        Case{"SameRangeTwice", [](const Victim& v) {
               v.EditHeader([](json& h) {
                 h["model.layers.0.mlp.gate_proj.weight"]["data_offsets"] = h[kUp]["data_offsets"];
               });
             },
             kSingle, "mlp"},
        Case{"Hole", [](const Victim& v) { v.EditHeader([](json& h) { h.erase(kUp); }); }, kSingle,
             "leaves a hole"},
        Case{"TensorRenamed", [](const Victim& v) {
               v.EditHeader([](json& h) {
                 h["model.norm.weights"] = h[kNorm];
                 h.erase(kNorm);
               });
             },
             kSingle, kNorm},
        Case{"ShapeTransposed", SetField(kUp, "shape", {64, 96}), kSingle, kUp},
        Case{"ShapeWithAnotherRank", SetField(kNorm, "shape", {1, 64}), kSingle, kNorm},
        Case{"DTypeWeCantMultiply", SetField(kNorm, "dtype", "I16"), kSingle, kNorm},
        Case{"TensorWithoutAPlace", [](const Victim& v) {
               v.EditHeader([](json& h) {
                 h["model.layers.0.mlp.down_proj.weight"].swap(h["model.layers.9.mlp.down"]);
               });
             },
             kSingle, "model.layers.0.mlp.down_proj.weight"}),
    CaseName);

}  // namespace
}  // namespace headstart
