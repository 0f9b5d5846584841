// What the program can't have or can't run: said at the start, with its exit code.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/program/exit_code.h"
#include "tests/e2e/child_process.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart::testing {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

class StartTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK(WriteTinyModel(dir_ / "tiny", TinyModelOptions())); }

  struct Ended {
    int exit_code = 0;
    std::string output;
  };
  Ended Run(const std::string& program, const std::vector<std::string>& arguments) {
    ChildProcess child(program, arguments, dir_ / "log");
    const int exit_code = child.Wait();
    return {exit_code, child.Output()};
  }
  Ended Inspect(const std::string& model, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {"inspect", "--model", model});
    return Run(HEADSTART_PROGRAM, more);
  }
  std::vector<std::string> Serve(const std::string& model,
                                 const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {"serve",       "--model",        model,        "--listen",
                                          "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  Ended RunServe(const std::string& model, const std::vector<std::string>& more = {}) {
    return Run(HEADSTART_PROGRAM, Serve(model, more));
  }

  TempDir dir_;
};

TEST_F(StartTest, AModelBeyondTheBackendsLimitsIsRefusedByField) {
  for (const int32_t head_dim : {8, 20, 100, 272}) {
    TinyModelOptions model;
    model.head_dim = head_dim;
    ASSERT_OK(WriteTinyModel(dir_ / "odd", model));
    const auto refused = AllOf(HasSubstr(absl::StrCat("config.json: head_dim=", head_dim)),
                               HasSubstr("multiple of 16 up to 256"));
    const Ended inspected = Inspect(dir_ / "odd");
    EXPECT_EQ(inspected.exit_code, kExitModel);
    EXPECT_THAT(inspected.output, refused);
    const Ended served = RunServe(dir_ / "odd");
    EXPECT_EQ(served.exit_code, kExitModel);
    EXPECT_THAT(served.output, AllOf(refused, Not(HasSubstr("percent"))));
  }
}

TEST_F(StartTest, APlanForAGpuNeedsNone) {
  TinyModelOptions model;
  model.head_dim = 64;
  model.max_positions = 131072;
  ASSERT_OK(WriteTinyModel(dir_ / "gpu", model));
  const Ended plan = Inspect(dir_ / "gpu", {"--device", "cuda", "--json"});
  ASSERT_EQ(plan.exit_code, kExitOk) << plan.output;
  EXPECT_GT(nlohmann::json::parse(plan.output)["memory_bytes"]["scratch"], 1 << 20);
  const Ended refused = Inspect(dir_ / "tiny", {"--device", "cuda"});
  EXPECT_EQ(refused.exit_code, kExitModel);
  EXPECT_THAT(refused.output, HasSubstr("head_dim=32 is not a multiple of 64 up to 128"));
  EXPECT_EQ(Inspect(dir_ / "gpu", {"--device", "cuda", "--dtype", "f32"}).exit_code, kExitUsage);
}

TEST_F(StartTest, SizesThatNobodyHasAreRefusedByName) {
  for (const auto& [flag, value] : {std::pair{"kv-pool-tokens", "9223372036854775807"},
                                    std::pair{"piece-tokens", "9223372036854775680"},
                                    std::pair{"max-prompt-tokens", "99999"}}) {
    std::string field = flag;
    std::replace(field.begin(), field.end(), '-', '_');
    const std::vector<std::string> flags = {absl::StrCat("--", flag), value};
    for (const Ended& ended : {Inspect(dir_ / "tiny", flags), RunServe(dir_ / "tiny", flags)}) {
      EXPECT_EQ(ended.exit_code, kExitModel) << ended.output;
      EXPECT_THAT(ended.output, HasSubstr(absl::StrCat(field, "=", value)));
    }
  }
}

TEST_F(StartTest, APlanThatDoesNotFitIsRefusedWithWhatIsMissing) {
  const Ended ended = RunServe(dir_ / "tiny", {"--kv-pool-tokens", "137438953344"});
  EXPECT_EQ(ended.exit_code, kExitModel);
  EXPECT_THAT(ended.output,
              AllOf(HasSubstr(" are missing"), HasSubstr("KV pool"), Not(HasSubstr("percent"))));
}

TEST_F(StartTest, ThreadsThatCantBeHadAreAUsageError) {
  for (const char* count : {"1025", "65536", "2147483647"}) {
    const Ended ended = RunServe(dir_ / "tiny", {"--threads", count});
    EXPECT_EQ(ended.exit_code, kExitUsage);
    EXPECT_THAT(ended.output, HasSubstr(absl::StrCat("num_threads=", count)));
  }
}

// Under a limit of `kib` of address space: whatever is short, the end is an exit code with a
// reason.
TEST_F(StartTest, MemoryThatCantBeHadEndsWithAReason) {
  for (const int kib : {100'000, 300'000}) {
    const std::string command = absl::StrCat("ulimit -v ", kib, "; exec ", HEADSTART_PROGRAM, " ",
                                             absl::StrJoin(Serve(dir_ / "tiny"), " "));
    const Ended ended = Run("/bin/sh", {"-c", command});
    EXPECT_THAT(ended.exit_code, AnyOf(kExitUsage, kExitModel, kExitRuntime))
        << kib << ended.output;
    EXPECT_THAT(ended.output,
                AnyOf(HasSubstr("can be had"), HasSubstr("out of memory"),
                      HasSubstr("cannot allocate"), HasSubstr("Resource temporarily")))
        << kib;
  }
}

TEST_F(StartTest, APortFileThatCantBeWrittenIsSaidBeforeLoading) {
  std::filesystem::create_directory(dir_ / "folder");
  for (const std::string& path : {dir_ / "none/ports", dir_ / "folder"}) {
    const Ended ended = RunServe(dir_ / "tiny", {"--port-file", path});
    EXPECT_EQ(ended.exit_code, kExitListen);
    EXPECT_THAT(ended.output, AllOf(HasSubstr(absl::StrCat("--port-file ", path)),
                                    Not(HasSubstr("memory plan")), Not(HasSubstr("listening"))));
  }
}

TEST_F(StartTest, NamesAreUtf8) {
  const std::string odd = dir_ / "m\xff";
  ASSERT_OK(WriteTinyModel(odd, TinyModelOptions()));
  for (const Ended& ended :
       {RunServe(odd), RunServe(dir_ / "tiny", {"--model-name", "a\xc0\x80"})}) {
    EXPECT_EQ(ended.exit_code, kExitUsage);
    EXPECT_THAT(ended.output, HasSubstr("not UTF-8"));
  }
  const Ended named = RunServe(odd, {"--model-name", "größe-模型-🦙", "--print-config"});
  EXPECT_EQ(named.exit_code, kExitOk) << named.output;
}

}  // namespace
}  // namespace headstart::testing
