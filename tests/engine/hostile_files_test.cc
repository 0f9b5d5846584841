// Indexes, shards, links and configurations that lie, and weights that are no numbers.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/engine/victim.h"

namespace headstart {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class HostileIndexTest : public HostileModelTest {};
TEST_P(HostileIndexTest, IsRefused) { Expect(/*num_shards=*/2); }

class HostileFileTest : public HostileModelTest {};
TEST_P(HostileFileTest, IsRefused) { Expect(/*num_shards=*/1); }

INSTANTIATE_TEST_SUITE_P(
    Index, HostileIndexTest,
    ::testing::Values(
        Case{"NotJson", [](const Victim& v) { v.Write(kIndex, "{"); }, kIndex, "not JSON"},
        Case{"NotAnObject", [](const Victim& v) { v.Write(kIndex, "[]"); }, kIndex,
             "not a JSON object"},
        Case{"NoWeightMap", [](const Victim& v) { v.Write(kIndex, "{}"); }, kIndex, "weight_map"},
        Case{"EmptyWeightMap", [](const Victim& v) { v.Write(kIndex, R"({"weight_map":{}})"); },
             kIndex, "weight_map"},
        Case{"OverSixteenMiB",
             [](const Victim& v) { v.WriteSparse(kIndex, "{", int64_t{17} << 20); }, kIndex,
             "limit"},
        Case{"ParentFolder",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"][kNorm] = "../x.safetensors"; });
             },
             kIndex, kNorm},
        Case{"AbsolutePath",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"][kNorm] = "/etc/x.safetensors"; });
             },
             kIndex, kNorm},
        Case{"Subfolder",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"][kNorm] = "a/x.safetensors"; });
             },
             kIndex, kNorm},
        Case{"NameWithNul",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) {
                 j["weight_map"][kNorm] = std::string("config.json\0.safetensors", 24);
               });
             },
             kIndex, kNorm},
        Case{"OtherKindOfFile",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"][kNorm] = "config.json"; });
             },
             kIndex, kNorm},
        Case{"ShardIsANumber",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"][kNorm] = 1; });
             },
             kIndex, kNorm},
        Case{"DuplicateTensor",
             [](const Victim& v) {
               v.Edit(kIndex, [](std::string& text) {
                 ReplaceFirst(
                     text, "\"weight_map\":{",
                     std::string("\"weight_map\":{\"") + kNorm + "\":\"" + kShard1 + "\",");
               });
             },
             kIndex, kNorm},
        Case{"ShardMissing", [](const Victim& v) { fs::remove(v.dir + "/" + kShard2); }, kShard2,
             "No such file"},
        Case{"TensorInTheOtherShard",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) {
                 for (auto& shard : j["weight_map"]) shard = shard == kShard1 ? kShard2 : kShard1;
               });
             },
             "model-0000", "is missing"},
        Case{"TensorNotInTheIndex",
             [](const Victim& v) {
               v.EditJson(kIndex, [](json& j) { j["weight_map"].erase(kNorm); });
             },
             "model-0000", "not in"},
        Case{"TensorInTwoShards",
             [](const Victim& v) {
               fs::copy_file(v.dir + "/" + kShard1, v.dir + "/" + kShard2,
                             fs::copy_options::overwrite_existing);
             },
             kShard2, "also in"},
        Case{"ShardIsAFolder",
             [](const Victim& v) {
               fs::remove(v.dir + "/" + kShard2);
               fs::create_directory(v.dir + "/" + kShard2);
             },
             kShard2, "not a regular file"}),
    CaseName);

// Overwrites the first value of the last tensor in the file, model.norm.weight.
std::function<void(const Victim&)> PoisonNorm(uint16_t bits) {
  return [bits](const Victim& v) {
    v.Edit(kSingle, [bits](std::string& file) {
      std::memcpy(file.data() + file.size() - 64 * sizeof(bits), &bits, sizeof(bits));
    });
  };
}

INSTANTIATE_TEST_SUITE_P(Values, HostileFileTest,
                         ::testing::Values(Case{"NaN", PoisonNorm(0x7fc0), kSingle,
                                                "norm.weight\": element 0 is not finite"},
                                           Case{"Infinity", PoisonNorm(0x7f80), kSingle,
                                                "norm.weight\": element 0 is not finite"},
                                           Case{"MinusInfinity", PoisonNorm(0xff80), kSingle,
                                                "norm.weight\": element 0 is not finite"}),
                         CaseName);

INSTANTIATE_TEST_SUITE_P(
    Files, HostileFileTest,
    ::testing::Values(
        Case{"WeightsMissing", [](const Victim& v) { fs::remove(v.dir + "/" + kSingle); }, "",
             "has neither model.safetensors nor"},
        Case{"WeightsAreAPipe",
             [](const Victim& v) {
               fs::remove(v.dir + "/" + kSingle);
               ASSERT_EQ(mkfifo((v.dir + "/" + kSingle).c_str(), 0600), 0);
             },
             kSingle, "not a regular file"},
        Case{"WeightsAreADevice",
             [](const Victim& v) {
               fs::remove(v.dir + "/" + kSingle);
               fs::create_symlink("/dev/zero", v.dir + "/" + kSingle);
             },
             kSingle, "outside of"},
        Case{"WeightsLinkOutside", [](const Victim& v) { v.LinkOutside(kSingle); }, kSingle,
             "outside of"},
        Case{"WeightsLinkToThemselves",
             [](const Victim& v) {
               fs::remove(v.dir + "/" + kSingle);
               fs::create_symlink(kSingle, v.dir + "/" + kSingle);
             },
             kSingle, "symbolic links"},
        Case{"ConfigMissing", [](const Victim& v) { fs::remove(v.dir + "/config.json"); },
             "config.json", "No such file"},
        Case{"ConfigLinksOutside", [](const Victim& v) { v.LinkOutside("config.json"); },
             "config.json", "outside of"},
        Case{"ConfigIsAPipe",
             [](const Victim& v) {
               fs::remove(v.dir + "/config.json");
               ASSERT_EQ(mkfifo((v.dir + "/config.json").c_str(), 0600), 0);
             },
             "config.json", "not a regular file"},
        Case{"ConfigOfAGigabyte",
             [](const Victim& v) { v.WriteSparse("config.json", "{", int64_t{1} << 30); },
             "config.json", "limit"},
        Case{"ConfigEmpty", [](const Victim& v) { v.Write("config.json", ""); }, "config.json",
             "empty file"},
        Case{"ConfigCutOff",
             [](const Victim& v) { v.Edit("config.json", [](std::string& t) { t.resize(40); }); },
             "config.json", "not JSON"},
        Case{"ConfigOfBrackets",
             [](const Victim& v) { v.Write("config.json", std::string(2'000'000, '[')); },
             "config.json", "nested deeper"},
        Case{"ConfigOfObjects",
             [](const Victim& v) {
               std::string deep;
               for (int i = 0; i < 400'000; ++i) deep += "{\"a\":";
               v.Write("config.json", deep);
             },
             "config.json", "nested deeper"},
        Case{"ConfigIsAString", [](const Victim& v) { v.Write("config.json", "\"llama\""); },
             "config.json", "not a JSON object"},
        Case{"ConfigBeyondTheWeights",
             [](const Victim& v) {
               v.EditJson("config.json", [](json& j) { j["num_hidden_layers"] = 64; });
             },
             kSingle, "model.layers.1.input_layernorm.weight"},
        Case{"ConfigWithAHugeVocabulary",
             [](const Victim& v) {
               v.EditJson("config.json", [](json& j) { j["vocab_size"] = 1 << 24; });
             },
             kSingle, "model.embed_tokens.weight"}),
    CaseName);

}  // namespace
}  // namespace headstart
