#include "engine/schedule/cost_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace headstart {
namespace {

using ::testing::AllOf;
using ::testing::DoubleNear;
using ::testing::Ge;
using ::testing::Le;

ProxyAttnOptions Sparse(float gamma = 0.9F) {
  ProxyAttnOptions options;
  options.enabled = true;
  options.gamma = gamma;
  return options;
}

// A machine whose times are known: about an H100 with a model of 8B parameters.
struct Machine {
  double step_seconds = 1e-3;
  double token_seconds = 22e-6;
  double pair_seconds = 0.9e-9;
  double selection_seconds = 0.05e-9;
  double noise = 0.05;
  std::mt19937 random{1};

  double Exact(const std::vector<PieceShape>& pieces, double density = 1) const {
    double seconds = step_seconds;
    for (const PieceShape& piece : pieces) {
      const auto tokens = static_cast<double>(piece.num_tokens);
      const double pairs = tokens * (static_cast<double>(piece.first_position) + tokens / 2);
      seconds += token_seconds * tokens;
      seconds += piece.attention == nullptr ? pair_seconds * pairs
                                            : (pair_seconds * density + selection_seconds) * pairs;
    }
    return seconds;
  }
  absl::Duration Run(const std::vector<PieceShape>& pieces, double density = 1) {
    return absl::Seconds(Exact(pieces, density) *
                         std::exp(std::normal_distribution<double>(0, noise)(random)));
  }
  int64_t Draw(int64_t least, int64_t most) {
    const double log_tokens = std::uniform_real_distribution<double>(
        std::log(static_cast<double>(least)), std::log(static_cast<double>(most)))(random);
    return std::llround(std::exp(log_tokens));
  }
};

std::vector<PieceShape> Dense(int64_t num_tokens, int64_t first_position = 0) {
  return {{.num_tokens = num_tokens, .first_position = first_position}};
}

double Predicted(const CostModel& model, const std::vector<PieceShape>& pieces) {
  return absl::ToDoubleSeconds(model.Predict(pieces).value_or(absl::ZeroDuration()));
}

// |predicted / exact - 1|
double Error(const CostModel& model, const Machine& machine, const std::vector<PieceShape>& pieces,
             double density = 1) {
  return std::abs(Predicted(model, pieces) / machine.Exact(pieces, density) - 1);
}

double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
}

TEST(CostModelTest, SaysNothingBeforeItHasSeenSteps) {
  CostModel model;
  Machine machine;
  for (int64_t i = 0; i < CostModel::kMinSteps; ++i) {
    EXPECT_EQ(model.Predict(Dense(100)), std::nullopt);
    EXPECT_EQ(model.TokensPerSecond(), std::nullopt);
    model.Learn(Dense(100), machine.Run(Dense(100)));
  }
  EXPECT_LT(Error(model, machine, Dense(100)), 0.1);
  EXPECT_THAT(model.TokensPerSecond().value(), DoubleNear(100 / machine.Exact(Dense(100)), 3000));
}

TEST(CostModelTest, KnowsLengthsThatItSawAndThoseBetween) {
  const Machine h100;
  // A model of 0.1B parameters on two cores, and a machine whose steps cost more than their tokens.
  const Machine cores{.step_seconds = 1e-3, .token_seconds = 200e-6, .pair_seconds = 60e-9};
  const Machine steps{.step_seconds = 0.5, .token_seconds = 22e-6, .pair_seconds = 0.9e-9};
  for (const Machine& kind : {h100, cores, steps}) {
    std::vector<double> errors;
    for (uint32_t seed = 0; seed < 20; ++seed) {
      CostModel model;
      Machine machine = kind;
      machine.random.seed(seed);
      const auto draw = [&] {
        return Dense(machine.Draw(100, 8192), 8192 * machine.Draw(1, 8) - 8192);
      };
      for (int i = 0; i < 40; ++i) {
        const auto step = draw();
        model.Learn(step, machine.Run(step));
      }
      for (int i = 0; i < 50; ++i) errors.push_back(Error(model, machine, draw()));
    }
    EXPECT_LT(Quantile(errors, 0.5), 0.05) << kind.step_seconds;
    EXPECT_LT(Quantile(errors, 0.95), 0.15) << kind.step_seconds;
  }
}

TEST(CostModelTest, KnowsBatchesFromSinglePiecesAndTheOtherWayRound) {
  std::vector<double> errors;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    const auto draw = [&] {
      std::vector<PieceShape> step;
      for (int64_t i = machine.Draw(1, 8); i > 0; --i) {
        step.push_back({.num_tokens = machine.Draw(16, 1024)});
      }
      return step;
    };
    for (int i = 0; i < 50; ++i) {
      const std::vector<PieceShape> step = draw();
      model.Learn(step, machine.Run(step));
    }
    for (int i = 0; i < 50; ++i) errors.push_back(Error(model, machine, draw()));
  }
  EXPECT_LT(Quantile(errors, 0.5), 0.05);
  EXPECT_LT(Quantile(errors, 0.95), 0.15);
}

TEST(CostModelTest, ReachesBeyondWhatItSaw) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    for (int i = 0; i < 200; ++i) {
      const auto step = Dense(machine.Draw(512, 8192));
      model.Learn(step, machine.Run(step));
    }
    double predicted = 0, exact = 0;
    for (int64_t position = 0; position < 128 << 10; position += 8 << 10) {
      predicted += Predicted(model, Dense(8 << 10, position));
      exact += machine.Exact(Dense(8 << 10, position));
    }
    EXPECT_THAT(predicted / exact, AllOf(Ge(0.7), Le(1.3))) << "seed " << seed;
  }
}

TEST(CostModelTest, ConstantTrafficUnlearnsNothingAboutOtherLengths) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    for (int i = 0; i < 200; ++i) {
      const auto step = Dense(machine.Draw(100, 8192), 8192 * machine.Draw(1, 8) - 8192);
      model.Learn(step, machine.Run(step));
    }
    for (int i = 0; i < 20000; ++i) model.Learn(Dense(1000), machine.Run(Dense(1000)));
    EXPECT_LT(Error(model, machine, Dense(1000)), 0.03) << seed;
    EXPECT_LT(Error(model, machine, Dense(100)), 0.3) << seed;
    EXPECT_LT(Error(model, machine, Dense(8192)), 0.15) << seed;
    EXPECT_LT(Error(model, machine, Dense(8192, 120 << 10)), 0.15) << seed;
  }
}

// From one length alone nobody can know the others; but they must not be absurd.
TEST(CostModelTest, OneLengthGivesSaneTimesForOthers) {
  CostModel model;
  Machine machine;
  for (int i = 0; i < 20000; ++i) model.Learn(Dense(1000), machine.Run(Dense(1000)));
  for (const auto& step : {Dense(100), Dense(8192), Dense(8192, 120 << 10)}) {
    EXPECT_THAT(Predicted(model, step) / machine.Exact(step), AllOf(Ge(0.3), Le(8)));
  }
}

TEST(CostModelTest, OneWildStepChangesLittle) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const double wild = seed % 2 == 0 ? 20 : 0.01;
    const bool at_new_length = seed % 4 < 2;
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    const auto learn = [&] {
      const auto step = Dense(machine.Draw(500, 4000));
      model.Learn(step, machine.Run(step));
    };
    for (int i = 0; i < 50; ++i) learn();
    const auto step = Dense(at_new_length ? 8192 : 2000);
    model.Learn(step, machine.Run(step) * wild);
    EXPECT_LT(Error(model, machine, Dense(1000)), 0.15) << seed;
    if (at_new_length) model.Learn(step, machine.Run(step));
    for (int i = 0; i < 20; ++i) learn();
    EXPECT_LT(Error(model, machine, Dense(1000)), 0.08) << seed;
    EXPECT_LT(Error(model, machine, Dense(8192)), 0.15) << seed;
  }
}

TEST(CostModelTest, FollowsAMachineThatChangesItsSpeed) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const double factor = seed % 2 == 0 ? 2.0 : 0.5;
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    for (int i = 0; i < 300; ++i) {
      const auto step = Dense(machine.Draw(100, 8192));
      model.Learn(step, machine.Run(step));
    }
    machine.step_seconds *= factor;
    machine.token_seconds *= factor;
    machine.pair_seconds *= factor;
    for (int i = 0; i < 50; ++i) model.Learn(Dense(2000), machine.Run(Dense(2000)));
    EXPECT_LT(Error(model, machine, Dense(2000)), 0.1) << seed;
    // Lengths that did not come again.
    EXPECT_LT(Error(model, machine, Dense(500)), 0.3) << seed;
    EXPECT_LT(Error(model, machine, Dense(8192)), 0.3) << seed;
  }
}

TEST(CostModelTest, TellsSparseFromDense) {
  ProxyAttnOptions sparse = Sparse();
  std::vector<double> errors;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    CostModel model;
    Machine machine{.random = std::mt19937(seed)};
    const auto density = [](int64_t end) { return std::min(1.0, 0.05 + 4000.0 / end); };
    const auto draw = [&] {
      const ProxyAttnOptions* attention = machine.Draw(1, 100) < 20 ? nullptr : &sparse;
      return std::vector<PieceShape>{{.num_tokens = 8192,
                                      .first_position = 8192 * machine.Draw(1, 15),
                                      .attention = attention}};
    };
    for (int64_t end = 16 << 10; end <= 128 << 10; end *= 2) {
      model.LearnDensity(sparse, end, density(end));
    }
    const auto run = [&](const std::vector<PieceShape>& step) {
      return density(step[0].first_position + step[0].num_tokens);
    };
    for (int i = 0; i < 60; ++i) {
      const auto step = draw();
      model.Learn(step, machine.Run(step, run(step)));
    }
    for (int i = 0; i < 40; ++i) {
      const auto step = draw();
      errors.push_back(Error(model, machine, step, run(step)));
    }
  }
  EXPECT_LT(Quantile(errors, 0.5), 0.05);
  EXPECT_LT(Quantile(errors, 0.95), 0.15);
}

TEST(CostModelTest, RemembersDensityByOptionsAndLength) {
  CostModel model;
  const ProxyAttnOptions fast = Sparse(0.8F);
  const ProxyAttnOptions balanced = Sparse(0.9F);
  const ProxyAttnOptions other = Sparse(0.7F);
  EXPECT_EQ(model.Density(fast, 100000), 1);
  model.LearnDensity(fast, 8192, 0.4);
  model.LearnDensity(fast, 131072, 0.1);
  EXPECT_THAT(model.Density(fast, 32768), DoubleNear(0.25, 1e-9));
  EXPECT_EQ(model.Density(fast, 1 << 20), 0.1);
  EXPECT_EQ(model.Density(fast, 5000), 0.4);
  EXPECT_EQ(model.Density(fast, fast.dense_below_tokens), 1);
  EXPECT_EQ(model.Density(ProxyAttnOptions(), 131072), 1);
  EXPECT_EQ(model.Density(balanced, 8192), 0.4) << "what sparse prompts have";
  model.LearnDensity(balanced, 8192, 0.6);
  EXPECT_EQ(model.Density(balanced, 8192), 0.6);
  EXPECT_EQ(model.Density(fast, 8192), 0.4);
  EXPECT_THAT(model.Density(other, 8192), DoubleNear(0.44, 1e-9));
  for (int i = 0; i < 100; ++i) model.LearnDensity(fast, 8192, 0.2);
  EXPECT_THAT(model.Density(fast, 8192), DoubleNear(0.2, 1e-6));
}

TEST(CostModelTest, ForgetsTheOptionsThatCameLeastLately) {
  CostModel model;
  ProxyAttnOptions kept = Sparse(0.5F);
  model.LearnDensity(kept, 8192, 0.9);
  for (int i = 0; i < 1000; ++i) {
    ProxyAttnOptions other = Sparse(0.5F + 0.0001F * static_cast<float>(i + 1));
    model.LearnDensity(other, 8192, 0.1);
    model.LearnDensity(kept, 8192, 0.9);
  }
  EXPECT_THAT(model.Density(kept, 8192), DoubleNear(0.9, 1e-9));
}

TEST(CostModelTest, WhatSaysNothingTeachesNothing) {
  CostModel model;
  Machine machine;
  const ProxyAttnOptions sparse = Sparse();
  const std::vector<PieceShape> unknown = {{.num_tokens = 8192, .attention = &sparse}};
  for (int64_t i = 0; i < 2 * CostModel::kMinSteps; ++i) {
    model.Learn({}, absl::Seconds(1));
    model.Learn(Dense(0, 4096), absl::Seconds(1));
    model.Learn(Dense(4096), absl::ZeroDuration());
    model.Learn(unknown, absl::Seconds(1));
  }
  EXPECT_EQ(model.Predict(Dense(100)), std::nullopt);
}

TEST(CostModelTest, MarginHoldsNearlyAlways) {
  CostModel model;
  std::mt19937 random(1);
  EXPECT_THAT(model.Margin(), AllOf(Ge(1.05), Le(2)));
  for (const double noise : {0.0, 0.05, 0.1, 0.3, 3.0}) {
    int held = 0;
    for (int i = 0; i < 1000; ++i) {
      const double actual = std::exp(std::normal_distribution<double>(0, noise)(random));
      if (actual <= model.Margin()) ++held;
      model.LearnError(absl::Seconds(1), absl::Seconds(actual));
    }
    EXPECT_THAT(model.Margin(), AllOf(Ge(1.05), Le(2))) << noise;
    if (noise < 1) {
      EXPECT_GE(held, 950) << noise;
    }
  }
  for (int i = 0; i < 200; ++i) model.LearnError(absl::Seconds(1), absl::Seconds(1));
  EXPECT_EQ(model.Margin(), 1.05);
}

}  // namespace
}  // namespace headstart
