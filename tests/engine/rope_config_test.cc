// RoPE in config.json: spellings, refusals, and the numbers against tests/engine/golden.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/model/model_config.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using testing::ConfigSpelling;
using ::testing::HasSubstr;
using testing::StatusIs;

json Config(double theta, const json& scaling, ConfigSpelling spelling, int64_t max_positions) {
  testing::TinyModelOptions options;
  options.rope_theta = theta;
  options.rope_scaling = scaling.is_null() ? "" : scaling.dump();
  options.spelling = spelling;
  options.max_positions = max_positions;
  return json::parse(testing::TinyModelConfig(options));
}

absl::StatusOr<ModelConfig> Parse(const json& config) {
  return ParseModelConfig(config.dump(), "config.json");
}

absl::StatusOr<ModelConfig> ParseScaling(const std::string& scaling) {
  return Parse(Config(1e4, json::parse(scaling), ConfigSpelling::kOld, 4096));
}

// The golden file's short names -> Hugging Face's.
json ScalingOf(const json& golden) {
  const std::pair<const char*, const char*> names[] = {
      {"type", "rope_type"},
      {"factor", "factor"},
      {"original", "original_max_position_embeddings"},
      {"low", "low_freq_factor"},
      {"high", "high_freq_factor"},
      {"beta_fast", "beta_fast"},
      {"beta_slow", "beta_slow"},
      {"truncate", "truncate"},
      {"mscale", "mscale"},
      {"mscale_all_dim", "mscale_all_dim"},
      {"attention_factor", "attention_factor"}};
  json scaling;
  for (const auto& [golden_name, name] : names) {
    if (golden.contains(golden_name)) scaling[name] = golden[golden_name];
  }
  return scaling;
}

std::vector<json> GoldenCases() {
  std::ifstream file(HEADSTART_GOLDEN_DIR "/rope_frequencies.json");
  return json::parse(file).get<std::vector<json>>();
}

class GoldenRopeTest : public ::testing::TestWithParam<json> {};

TEST_P(GoldenRopeTest, MatchesInBothSpellings) {
  const json& golden = GetParam();
  for (const ConfigSpelling spelling : {ConfigSpelling::kOld, ConfigSpelling::kNew}) {
    ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                         Parse(Config(golden["rope"]["theta"], ScalingOf(golden["rope"]), spelling,
                                      /*max_positions=*/131072)));
    EXPECT_NEAR(config.rope.attention_factor, golden["attention_factor"], 1e-12);
    const int32_t head_dim = golden["head_dim"];
    const std::vector<float> actual = InverseFrequencies(config.rope, head_dim);
    const auto expected = golden["inv_freq"].get<std::vector<double>>();
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      // fp32 throughout: the exponent 2 i / d is rounded, and ln(theta) <= 14 of it shows.
      EXPECT_NEAR(actual[i], expected[i], 2e-6 * expected[i]) << "dimension " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenRopeTest, ::testing::ValuesIn(GoldenCases()),
                         [](const auto& info) {
                           std::string name = info.param["name"];
                           std::erase(name, '.');
                           return name;
                         });

TEST(RopeConfigTest, TakesTheOldNameOfTheType) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig old_name,
                       ParseScaling(R"({"type": "linear", "factor": 2})"));
  EXPECT_EQ(old_name.rope.type, RopeType::kLinear);
  EXPECT_EQ(old_name.rope.factor, 2.0);
  ASSERT_OK_AND_ASSIGN(const ModelConfig both,
                       ParseScaling(R"({"type": "linear", "rope_type": "linear", "factor": 2})"));
  EXPECT_EQ(both.rope, old_name.rope);
  EXPECT_THAT(ParseScaling(R"({"type": "linear", "rope_type": "yarn", "factor": 2})"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("config.json: rope_scaling: type=\"linear\" differs")));
}

TEST(RopeConfigTest, TakesBothSpellingsWhenTheySayTheSame) {
  json config = Config(5e5, json::parse(R"({"rope_type": "linear", "factor": 2})"),
                       ConfigSpelling::kOld, 4096);
  config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}};
  ASSERT_OK_AND_ASSIGN(const ModelConfig parsed, Parse(config));
  EXPECT_EQ(parsed.rope.theta, 5e5);
  config["rope_parameters"]["factor"] = 4.0;
  EXPECT_THAT(Parse(config), StatusIs(absl::StatusCode::kInvalidArgument,
                                      AllOf(HasSubstr("rope_scaling"), HasSubstr("rope_parameters"),
                                            HasSubstr("different"))));
  config.erase("rope_scaling");
  config["rope_theta"] = 1e6;
  EXPECT_THAT(Parse(config),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("rope_theta=1000000.0 differs from rope_parameters.rope_theta")));
}

TEST(RopeConfigTest, ScalingStretchesTheContext) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig linear,
                       ParseScaling(R"({"rope_type": "linear", "factor": 4})"));
  EXPECT_EQ(linear.max_positions, 4 * 4096);
  ASSERT_OK_AND_ASSIGN(
      const ModelConfig yarn,
      ParseScaling(
          R"({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 2048})"));
  EXPECT_EQ(yarn.max_positions, 4 * 2048);
  ASSERT_OK_AND_ASSIGN(const ModelConfig llama3,
                       ParseScaling(R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                       "high_freq_factor": 4, "original_max_position_embeddings": 2048})"));
  EXPECT_EQ(llama3.max_positions, 4096);  // max_position_embeddings is the stretched one there
}

TEST(RopeConfigTest, TheContextStandsInForTheOriginalOne) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig yarn, ParseScaling(R"({"type": "yarn", "factor": 4})"));
  EXPECT_EQ(yarn.rope.original_max_positions, 4096);
  ASSERT_OK_AND_ASSIGN(
      const ModelConfig implied,
      ParseScaling(R"({"type": "yarn", "original_max_position_embeddings": 1024})"));
  EXPECT_EQ(implied.rope.factor, 4.0);
}

struct Refusal {
  std::string scaling;
  std::string message;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.scaling; }

class RopeRefusalTest : public ::testing::TestWithParam<Refusal> {};

TEST_P(RopeRefusalTest, NamesTheField) {
  EXPECT_THAT(ParseScaling(GetParam().scaling),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("config.json: rope_scaling" + GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    All, RopeRefusalTest,
    ::testing::Values(
        Refusal{R"({"rope_type": "dynamic", "factor": 2})", ": rope_type=\"dynamic\" is not"},
        Refusal{R"({"type": "longrope"})", ": type=\"longrope\" is not"},
        Refusal{R"({"rope_type": 3})", ": rope_type=3 is not a string"},
        Refusal{R"({"rope_type": "linear"})", ": factor is missing"},
        Refusal{R"({"rope_type": "linear", "factor": 0.5})", ": factor=0.5 is not in"},
        Refusal{R"({"rope_type": "linear", "factor": "2"})", ": factor=\"2\" is not a number"},
        Refusal{R"({"rope_type": "llama3", "factor": 8, "high_freq_factor": 4})",
                ": low_freq_factor is missing"},
        Refusal{R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                    "high_freq_factor": 4})",
                ": high_freq_factor=4 is not above"},
        Refusal{R"({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2})",
                ": beta_fast=1 is less"},
        Refusal{R"({"rope_type": "default", "rope_theta": 0.5})", ": rope_theta=0.5 is not in"},
        Refusal{R"({"rope_type": "default", "partial_rotary_factor": 0.25})",
                ": partial_rotary_factor=0.25"},
        Refusal{R"({"rope_type": "default", "mrope_section": [16, 24, 24]})",
                ": mrope_section=[…] is an unknown field"},
        Refusal{R"({"full_attention": {"rope_type": "default"}})", ": full_attention={…}"},
        Refusal{R"(["linear", 2])", "=[…] is not an object"}));

}  // namespace
}  // namespace headstart
