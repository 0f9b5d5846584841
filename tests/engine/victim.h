// A model directory that a test damages, and what must come of it: an error that names the file and
// the culprit, quickly and in little memory.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/stopwatch.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/kv_collector.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {

inline constexpr char kSingle[] = "model.safetensors";
inline constexpr char kIndex[] = "model.safetensors.index.json";
inline constexpr char kShard1[] = "model-00001-of-00002.safetensors";
inline constexpr char kShard2[] = "model-00002-of-00002.safetensors";
inline constexpr char kNorm[] = "model.norm.weight";  // its data comes last in the file
inline constexpr char kUp[] = "model.layers.0.mlp.up_proj.weight";

// A model directory that a case damages.
struct Victim {
  std::string dir;

  std::string Read(const std::string& name) const {
    std::ifstream file(dir + "/" + name, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  void Write(const std::string& name, absl::string_view content) const {
    ASSERT_OK(testing::WriteFile(dir + "/" + name, content));
  }
  void Edit(const std::string& name, const std::function<void(std::string&)>& change) const {
    std::string content = Read(name);
    change(content);
    Write(name, content);
  }
  // The header of a safetensors file as JSON; its data stays.
  void EditHeader(const std::function<void(nlohmann::json&)>& change,
                  const std::string& name = kSingle) const {
    Edit(name, [&](std::string& file) {
      const auto [header, data] = Split(file);
      nlohmann::json parsed = nlohmann::json::parse(header);
      change(parsed);
      file = testing::SafetensorsFile(parsed.dump(), data);
    });
  }
  // Replaces the header's text, length included.
  void EditHeaderText(const std::function<void(std::string&)>& change) const {
    Edit(kSingle, [&](std::string& file) {
      auto [header, data] = Split(file);
      change(header);
      file = testing::SafetensorsFile(header, data);
    });
  }
  void EditJson(const std::string& name, const std::function<void(nlohmann::json&)>& change) const {
    Edit(name, [&](std::string& text) {
      nlohmann::json parsed = nlohmann::json::parse(text);
      change(parsed);
      text = parsed.dump();
    });
  }
  // A file of `bytes` bytes, of which only the first are there; the rest is a hole of zeros.
  void WriteSparse(const std::string& name, absl::string_view content, int64_t bytes) const {
    Write(name, content);
    std::filesystem::resize_file(dir + "/" + name, static_cast<uintmax_t>(bytes));
  }
  void LinkOutside(const std::string& name) const {
    const std::string outside = dir + "_outside_" + name;
    std::filesystem::rename(dir + "/" + name, outside);
    std::filesystem::create_symlink(outside, dir + "/" + name);
  }

 private:
  static std::pair<std::string, std::string> Split(const std::string& file) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof(length));
    return {file.substr(8, length), file.substr(8 + length)};
  }
};

inline std::string LengthBytes(uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes;
}

inline void ReplaceFirst(std::string& text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
}

struct Case {
  std::string name;
  std::function<void(const Victim&)> damage;
  std::string file;     // part of the message
  std::string culprit;  // tensor, field or reason: part of the message
};

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// Highest resident memory of this process so far, in MiB.
inline int64_t PeakMemoryMib() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    int64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib / 1024;
  }
  return 0;
}

inline absl::Status Load(const std::string& dir) {
  EngineOptions options;
  options.model_dir = dir;
  options.backend.dtype = ComputeDType::kF32;
  options.backend.num_threads = 1;
  HEADSTART_ASSIGN_OR_RETURN(auto backend, MakeBackend(options.backend));
  return testing::MakeEngine(options, std::move(backend)).status();
}

class HostileModelTest : public ::testing::TestWithParam<Case> {
 protected:
  void Expect(int32_t num_shards) {
    testing::TinyModelOptions options;
    options.num_layers = 1;
    options.num_shards = num_shards;
    const Victim victim{root_ / "model"};
    ASSERT_OK(testing::WriteTinyModel(victim.dir, options));
    ASSERT_OK(Load(victim.dir)) << "before the damage";
    GetParam().damage(victim);
    const Stopwatch time;
    EXPECT_THAT(Load(victim.dir),
                testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                  ::testing::AllOf(::testing::HasSubstr(victim.dir),
                                                   ::testing::HasSubstr(GetParam().file),
                                                   ::testing::HasSubstr(GetParam().culprit))));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    EXPECT_LT(time.seconds(), 2.0);
    EXPECT_LT(PeakMemoryMib(), 96);
#endif
  }
  testing::TempDir root_;
};

inline std::string CaseName(const ::testing::TestParamInfo<Case>& info) { return info.param.name; }

}  // namespace headstart
