#include "server/options.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "server/program/flags.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

// The command line of a server, as the program parses it.
class OptionsTest : public ::testing::Test {
 protected:
  OptionsTest() { AddServerOptions(&app_, &options_); }

  // False on a usage error, whose text is then in `error_`.
  bool Parse(std::vector<std::string> arguments) {
    try {
      app_.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
    } catch (const CLI::ParseError& error) {
      error_ = error.what();
      return false;
    }
    return true;
  }

  std::string WriteConfig(const std::string& text) {
    const std::string path = dir_ / "server.toml";
    EXPECT_OK(testing::WriteFile(path, text));
    return path;
  }

  testing::TempDir dir_;
  CLI::App app_{"test", "serve"};
  ServerOptions options_;
  std::string error_;
};

TEST_F(OptionsTest, EveryFlagHasHelpAndAnEnvironmentVariable) {
  int count = 0;
  for (const CLI::Option* option : app_.get_options()) {
    if (option->get_name() == "--help") continue;
    const std::string flag = option->get_name().substr(2);
    EXPECT_FALSE(option->get_description().empty()) << flag;
    EXPECT_EQ(option->get_envname(), EnvironmentName(flag));
    ++count;
  }
  EXPECT_GT(count, 50);
}

TEST_F(OptionsTest, FlagsAreTheTableOfTheReadme) {
  std::vector<std::string> expected, written;
  for (const CLI::Option* option : app_.get_options()) {
    if (option->get_name() == "--help") continue;
    std::string value = option->get_default_str();
    if (value == "\"\"") value = "";
    if (!value.empty()) value = "`" + value + "`";
    expected.push_back("| `" + option->get_name() + "` | " + value + " | " +
                       option->get_description() + " |");
  }
  std::ifstream readme(HEADSTART_SOURCE_DIR "/server/REFERENCE.md");
  for (std::string line; std::getline(readme, line);) {
    if (line.rfind("| `--", 0) == 0) written.push_back(line);
  }
  EXPECT_EQ(written, expected);
}

TEST_F(OptionsTest, ReadsFlagsOfEveryKind) {
  ASSERT_TRUE(Parse({"--model", "/models/x", "--dtype", "f32", "--drain-timeout", "1m30s",
                     "--host-kv-bytes", "4MB", "--attention", "fast", "--gamma", "0.5",
                     "--dense-layers", "0,3", "--tls-allowed-san", "a.b,c.d"}))
      << error_;
  EXPECT_EQ(options_.model_dir, "/models/x");
  EXPECT_EQ(options_.backend.dtype, ComputeDType::kF32);
  EXPECT_EQ(options_.drain_timeout, absl::Seconds(90));
  EXPECT_EQ(options_.host_kv_bytes, 4 << 20);
  EXPECT_EQ(options_.attention.request.preset, AttentionPreset::kFast);
  EXPECT_EQ(options_.attention.request.gamma, 0.5f);
  EXPECT_EQ(options_.attention.request.stride, std::nullopt);
  EXPECT_EQ(options_.attention.dense_layers, (std::vector<int32_t>{0, 3}));
  EXPECT_EQ(options_.tls.allowed_sans, (std::vector<std::string>{"a.b", "c.d"}));
}

TEST_F(OptionsTest, RefusesBadValues) {
  for (const auto& arguments : std::vector<std::vector<std::string>>{{"--drain-timeout", "60"},
                                                                     {"--drain-timeout", "-3s"},
                                                                     {"--drain-timeout", "inf"},
                                                                     {"--max-deadline", "87601h"},
                                                                     {"--dtype", "int4"},
                                                                     {"--attention", "sparse"},
                                                                     {"--max-queue-requests", "0"},
                                                                     {"--device", "tpu"},
                                                                     {"--host-kv-bytes", "much"},
                                                                     {"--default-lease", "0s"},
                                                                     {"--no-such-flag"}}) {
    EXPECT_FALSE(Parse(arguments)) << arguments[0];
    EXPECT_THAT(error_, HasSubstr(arguments[0].substr(2))) << error_;
  }
}

TEST_F(OptionsTest, ConfigFileFillsWhatIsNotSetOtherwise) {
  setenv("HEADSTART_MODEL_NAME", "from-environment", 1);
  const bool parsed = Parse({"--listen", "127.0.0.1:1"});
  unsetenv("HEADSTART_MODEL_NAME");
  ASSERT_TRUE(parsed) << error_;
  const std::string path = WriteConfig(
      "# a comment\nmodel = \"/models/x\"\nlisten = \"127.0.0.1:2\"\nmodel-name = \"from-file\"\n"
      "drain-timeout = \"7s\"\nmax-queue-requests = 3\ntls-allowed-san = [\"a\", \"b\"]\n");
  ASSERT_OK(ApplyConfigFile(&app_, path));
  EXPECT_EQ(options_.model_dir, "/models/x");
  EXPECT_EQ(options_.listen, "127.0.0.1:1");
  EXPECT_EQ(options_.model_name, "from-environment");
  EXPECT_EQ(options_.drain_timeout, absl::Seconds(7));
  EXPECT_EQ(options_.max_queue_requests, 3);
  EXPECT_EQ(options_.tls.allowed_sans, (std::vector<std::string>{"a", "b"}));
}

TEST_F(OptionsTest, ConfigFileErrorsNameFileAndOption) {
  ASSERT_TRUE(Parse({}));
  EXPECT_THAT(ApplyConfigFile(&app_, dir_ / "none.toml"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("none.toml")));
  EXPECT_THAT(ApplyConfigFile(&app_, WriteConfig("drain-timeuot = \"7s\"\n")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("drain-timeuot")));
  EXPECT_THAT(ApplyConfigFile(&app_, WriteConfig("[section]\nmodel = \"x\"\n")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("section")));
  EXPECT_THAT(ApplyConfigFile(&app_, WriteConfig("drain-timeout = \"soon\"\n")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("drain-timeout")));
}

TEST_F(OptionsTest, ServersWithTheSameOptionsHaveTheSameHash) {
  const auto hash_of = [](const std::vector<std::string>& arguments) {
    CLI::App app{"test", "serve"};
    ServerOptions options;
    AddServerOptions(&app, &options);
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
    return HashOptions(app);
  };
  const std::string hash = hash_of({"--model", "/models/x"});
  EXPECT_EQ(hash.size(), 12u);
  EXPECT_EQ(
      hash_of({"--model", "/models/x", "--listen", "0.0.0.0:1", "--fetch-address", "10.0.0.1:1"}),
      hash);
  EXPECT_NE(hash_of({"--model", "/models/y"}), hash);
  EXPECT_NE(hash_of({"--model", "/models/x", "--gamma", "0.5"}), hash);
  EXPECT_NE(hash_of({"--model", "/models/x", "--drain-timeout", "9s"}), hash);
}

TEST_F(OptionsTest, PrintedConfigIsAConfigFile) {
  ASSERT_TRUE(Parse({"--model", "/models/x", "--stride", "8", "--drain-timeout", "9s",
                     "--tls-allowed-san", "a,b", "--dense-layers", "1,2"}));
  const std::string printed = app_.config_to_str(true, true);
  CLI::App second{"test", "serve"};
  ServerOptions options;
  AddServerOptions(&second, &options);
  second.parse(std::vector<std::string>());
  ASSERT_OK(ApplyConfigFile(&second, WriteConfig(printed)));
  EXPECT_EQ(second.config_to_str(true, true), printed);
  EXPECT_EQ(options.attention.request.stride, 8);
  EXPECT_EQ(options.drain_timeout, absl::Seconds(9));
}

TEST_F(OptionsTest, PrintedDefaultsChangeNothing) {
  ASSERT_TRUE(Parse({"--model", "/models/x"}));
  const std::string path = WriteConfig(app_.config_to_str(true, true));
  CLI::App second{"test", "serve"};
  ServerOptions options;
  AddServerOptions(&second, &options);
  second.parse(std::vector<std::string>());
  ASSERT_OK(ApplyConfigFile(&second, path));
  EXPECT_OK(ValidateOptions(options));
  EXPECT_TRUE(options.tls.allowed_sans.empty());
  EXPECT_TRUE(options.attention.dense_layers.empty());
  EXPECT_FALSE(options.attention.request.HasOverrides());
}

TEST_F(OptionsTest, ValidatesWhatFlagsAloneCanNotSay) {
  EXPECT_THAT(ValidateOptions(options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--model")));
  options_.model_dir = "/models/x";
  EXPECT_OK(ValidateOptions(options_));
  const auto expect_refused = [this](auto change, const char* flag) {
    ServerOptions changed = options_;
    change(changed);
    EXPECT_THAT(ValidateOptions(changed),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(flag)));
  };
  expect_refused([](ServerOptions& o) { o.piece_tokens = 1000; }, "--piece-tokens");
  expect_refused([](ServerOptions& o) { o.batch_tokens = 1000; }, "--batch-tokens");
  expect_refused([](ServerOptions& o) { o.batch_tokens = 8192 + 128; }, "--batch-tokens");
  expect_refused([](ServerOptions& o) { o.max_deadline = absl::Seconds(1); }, "--default-deadline");
  expect_refused([](ServerOptions& o) { o.max_lease = absl::Seconds(1); }, "--default-lease");
  expect_refused([](ServerOptions& o) { o.fetch_address = "10.0.0.7"; }, "--fetch-address");
  expect_refused([](ServerOptions& o) { o.tls.cert_file = "x"; }, "--tls-cert");
  expect_refused([](ServerOptions& o) { o.tls.client_ca_file = "x"; }, "--tls-client-ca");
  expect_refused([](ServerOptions& o) { o.tls.allowed_sans = {"x"}; }, "--tls-allowed-san");
}

TEST_F(OptionsTest, ModelNameIsTheFoldersUnlessSet) {
  options_.model_dir = "/models/SmolLM2/";
  EXPECT_EQ(ServedModelName(options_), "SmolLM2");
  options_.model_dir = "SmolLM2/.";
  EXPECT_EQ(ServedModelName(options_), "SmolLM2");
  options_.model_name = "smol";
  EXPECT_EQ(ServedModelName(options_), "smol");
}

}  // namespace
}  // namespace headstart
