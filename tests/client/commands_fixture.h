// The client commands from the command line to the exit code, against a made-up server.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "client/commands/bench_command.h"
#include "client/commands/loads_command.h"
#include "client/commands/request_command.h"
#include "tests/client/fake_server.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/temp_dir.h"

namespace headstart {

// The server answers with the KV of one prompt of 21 tokens, whose ids are in the file "ids".
class CommandsTest : public ::testing::Test {
 protected:
  CommandsTest() : kv_(testing::MakeKv(spec_)), stream_(testing::MakeStream(spec_, kv_)) {
    stream_[0].mutable_accepted()->set_request_id("\x1b[31mred");
    testing::EditCompleted(&stream_.back(), [](v1::Completed& completed) {
      v1::PrefillStatistics& statistics = *completed.mutable_statistics();
      statistics.mutable_attention()->set_nanos(250'000'000);
      statistics.mutable_exposed_transfer()->set_nanos(125'000'000);
      statistics.mutable_total()->set_seconds(1);
      statistics.set_executed_blocks(3);
      statistics.set_causal_blocks(4);
      completed.mutable_manifest()->set_layer_density(1, 0.5f);
    });
    Serve([this](int, grpc::ServerContext&, testing::PrefillWriter& writer) {
      testing::WriteStream(stream_, writer);
      return grpc::Status::OK;
    });
    std::ofstream ids(dir_ / "ids");
    const v1::PrefillRequest request = testing::RequestFor(spec_);
    for (const uint32_t id : request.token_ids()) ids << id << "\n";
  }

  void Serve(testing::FakeServer::Handler handler) {
    server_ = std::make_unique<testing::FakeServer>(std::move(handler));
  }

  // Runs a command line; the exit code. Output in stdout_ and stderr_.
  int Run(const std::string& command, std::vector<std::string> arguments) {
    CLI::App app;
    int exit_code = -1;
    AddRequestCommand(app, [&](int code) { exit_code = code; });
    AddBenchCommand(app, [&](int code) { exit_code = code; });
    AddLoadsCommand(app, [&](int code) { exit_code = code; });
    arguments.insert(arguments.begin(), {command, "--target", server_->target()});
    std::reverse(arguments.begin(), arguments.end());
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    try {
      app.parse(arguments);
    } catch (const CLI::ParseError& error) {
      stderr_ = error.what();
      exit_code = 2;
    }
    stdout_ = ::testing::internal::GetCapturedStdout();
    stderr_ += ::testing::internal::GetCapturedStderr();
    return exit_code;
  }

  const testing::KvStreamSpec spec_;
  const std::vector<std::byte> kv_;
  testing::KvStream stream_;
  testing::TempDir dir_;
  std::unique_ptr<testing::FakeServer> server_;
  std::string stdout_, stderr_;
};

}  // namespace headstart
