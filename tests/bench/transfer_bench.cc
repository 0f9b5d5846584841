// What gRPC itself can do: moves host memory from a server to a client, both ends without anything
// of Headstart between gRPC and the memory, and prints GB/s and CPU time.
//
// Usage: transfer_bench [--serve | --connect TARGET] [--bytes N] [--connections 1,2,8] …
// Without --serve and --connect the server runs as a child process.
//
// The client is set up as measured best (README.md); --plain leaves everything at its default.
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "tests/bench/grpc_loop.h"

namespace headstart {
namespace {

const std::map<std::string, Arrival> kArrivals = {
    {"drop", Arrival::kDrop}, {"copy", Arrival::kCopy}, {"check", Arrival::kCopyAndCheck}};
const std::map<std::string, Waiting> kWaitings = {{"callback", Waiting::kCallback},
                                                  {"queue", Waiting::kQueue}};

struct Flags {
  bool serve = false;
  std::string connect;
  std::string listen = "127.0.0.1:0";
  int64_t bytes = int64_t{1} << 30;
  std::vector<int> connections = {1, 2, 4, 8};
  std::vector<int64_t> payload_bytes = {1 << 20};
  std::vector<Waiting> waiting = {Waiting::kCallback, Waiting::kQueue};
  int runs = 3;
  bool plain = false;
  LoopOptions loop;
  std::vector<std::string> arguments;
  std::vector<std::string> client_arguments;
  std::vector<std::string> server_arguments;
};

[[noreturn]] void Die(const absl::Status& status) {
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

double CpuSeconds(int who) {
  rusage usage;
  getrusage(who, &usage);
  const auto seconds = [](const timeval& time) { return time.tv_sec + 1e-6 * time.tv_usec; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Memory whose pages are there before the clock runs.
absl::Span<std::byte> AllocateTouched(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) Die(absl::ErrnoToStatus(errno, absl::StrCat("mmap of ", bytes)));
  return absl::MakeSpan(static_cast<std::byte*>(memory), bytes);
}

// No two words are equal, so that a payload in the wrong place shows.
void FillUnequal(absl::Span<std::byte> memory) {
  for (size_t at = 0; at + sizeof(uint64_t) <= memory.size(); at += sizeof(uint64_t)) {
    const uint64_t word = (at + 1) * 0x9E3779B97F4A7C15u;  // odd: the product is a bijection
    std::memcpy(memory.data() + at, &word, sizeof(word));
  }
}

// "name=number" as channel arguments of gRPC, "name=text" where it is no number.
template <typename SetInt, typename SetString>
void ApplyArguments(const std::vector<std::string>& arguments, SetInt set_int,
                    SetString set_string) {
  for (const std::string& argument : arguments) {
    const std::string name = argument.substr(0, argument.find('='));
    const std::string value = argument.substr(std::min(argument.size(), name.size() + 1));
    int number;
    if (absl::SimpleAtoi(value, &number)) {
      set_int(name, number);
    } else {
      set_string(name, value);
    }
  }
}

// ---- the server

// Says its port on `out`, serves until `in` is closed, then says what it used.
void Serve(const Flags& flags, int in, int out) {
  const absl::Span<std::byte> source = AllocateTouched(flags.bytes);
  FillUnequal(source);
  LoopService service(source);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(flags.listen, grpc::InsecureServerCredentials(), &port);
  for (const auto* arguments : {&flags.arguments, &flags.server_arguments}) {
    const auto set = [&builder](const std::string& name, const auto& value) {
      builder.AddChannelArgument(name, value);
    };
    ApplyArguments(*arguments, set, set);
  }
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (!server) Die(absl::UnavailableError(absl::StrCat("can't listen on ", flags.listen)));
  dprintf(out, "%d\n", port);
  // Each line is a question: what was used until now?
  char byte;
  while (read(in, &byte, 1) == 1) {
    dprintf(out, "%f %lld\n", CpuSeconds(RUSAGE_SELF),
            static_cast<long long>(service.peak_bytes_in_flight()));
  }
  server->Shutdown();
}

// A server in a child process, made before this one has used gRPC.
class ServerProcess {
 public:
  explicit ServerProcess(const Flags& flags) {
    int to_child[2];
    int from_child[2];
    if (pipe(to_child) != 0 || pipe(from_child) != 0) Die(absl::ErrnoToStatus(errno, "pipe"));
    pid_ = fork();
    if (pid_ < 0) Die(absl::ErrnoToStatus(errno, "fork"));
    if (pid_ == 0) {
      close(to_child[1]);
      close(from_child[0]);
      Serve(flags, to_child[0], from_child[1]);
      std::exit(0);
    }
    close(to_child[0]);
    close(from_child[1]);
    in_ = to_child[1];
    out_ = fdopen(from_child[0], "r");
    if (std::fscanf(out_, "%d", &port_) != 1)
      Die(absl::UnavailableError("the server did not start"));
  }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  ~ServerProcess() {
    close(in_);
    waitpid(pid_, nullptr, 0);
    fclose(out_);
  }

  struct Usage {
    double cpu_seconds = 0;
    long long peak_bytes_in_flight = 0;
  };
  Usage Ask() {
    Usage usage;
    if (write(in_, "\n", 1) != 1 ||
        std::fscanf(out_, "%lf %lld", &usage.cpu_seconds, &usage.peak_bytes_in_flight) != 2)
      Die(absl::UnavailableError("the server does not answer"));
    return usage;
  }

  std::string target() const { return absl::StrCat("127.0.0.1:", port_); }

 private:
  pid_t pid_ = -1;
  int in_ = -1;
  FILE* out_ = nullptr;
  int port_ = 0;
};

// ---- the client

// gRPC takes memory from malloc for every piece that it receives. glibc would give most of it back
// to the kernel after each message, and the next one would wait for empty pages again.
void KeepFreedMemory() {
  if (!mallopt(M_TRIM_THRESHOLD, 1 << 30)) Die(absl::InternalError("mallopt: M_TRIM_THRESHOLD"));
}

grpc::ChannelArguments ClientArguments(const Flags& flags) {
  grpc::ChannelArguments result;
  // Probing opens the window so far that megabytes wait between sender and reader, out of cache.
  if (!flags.plain) result.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  for (const auto* arguments : {&flags.arguments, &flags.client_arguments}) {
    ApplyArguments(
        *arguments, [&](const std::string& name, int value) { result.SetInt(name, value); },
        [&](const std::string& name, const std::string& value) { result.SetString(name, value); });
  }
  return result;
}

// One row: the median of the runs. Without `server` its CPU time is not known here.
void Measure(const Flags& flags, const LoopOptions& loop, const std::string& target,
             ServerProcess* server, absl::Span<std::byte> destination) {
  struct Run {
    double seconds, client_cpu, server_cpu;
    bool operator<(const Run& other) const { return seconds < other.seconds; }
  };
  std::vector<Run> runs;
  ServerProcess::Usage after;
  for (int i = 0; i < flags.runs; ++i) {
    const ServerProcess::Usage before = server ? server->Ask() : after;
    const double client_before = CpuSeconds(RUSAGE_SELF);
    const auto seconds = FetchAll(target, loop, ClientArguments(flags), destination);
    if (!seconds.ok()) Die(seconds.status());
    if (server) after = server->Ask();
    runs.push_back({*seconds, CpuSeconds(RUSAGE_SELF) - client_before,
                    after.cpu_seconds - before.cpu_seconds});
  }
  std::sort(runs.begin(), runs.end());
  const Run& median = runs[runs.size() / 2];
  const double gigabytes = 1e-9 * static_cast<double>(destination.size());
  const bool queue = loop.waiting == Waiting::kQueue;
  std::printf("%-8s %11d %7lld %8.2f %8.2f %8.2f %7.0f %7.0f\n", queue ? "queue" : "callback",
              loop.connections, static_cast<long long>(loop.payload_bytes >> 10),
              gigabytes / median.seconds, gigabytes / runs.back().seconds,
              gigabytes / runs.front().seconds, 1e3 * median.server_cpu / gigabytes,
              1e3 * median.client_cpu / gigabytes);
  std::fflush(stdout);
}

void Connect(const Flags& flags, const std::string& target, ServerProcess* server) {
  if (!flags.plain) KeepFreedMemory();
  const absl::Span<std::byte> destination = AllocateTouched(flags.bytes);
  std::printf("%.2f GB, median of %d runs; server and client: CPU milliseconds for each GB\n",
              1e-9 * flags.bytes, flags.runs);
  std::printf("%-8s %11s %7s %8s %8s %8s %7s %7s\n", "waiting", "connections", "KiB", "GB/s",
              "slowest", "fastest", "server", "client");
  for (const Waiting waiting : flags.waiting) {
    for (const int64_t payload_bytes : flags.payload_bytes) {
      for (const int connections : flags.connections) {
        LoopOptions loop = flags.loop;
        loop.waiting = waiting;
        loop.payload_bytes = payload_bytes;
        loop.connections = connections;
        Measure(flags, loop, target, server, destination);
      }
    }
  }
  if (server) std::printf("at most %.1f MB in flight\n", 1e-6 * server->Ask().peak_bytes_in_flight);
}

int Run(int argc, char** argv) {
  Flags flags;
  CLI::App app("Moves memory over bare gRPC and prints GB/s");
  app.add_flag("--serve", flags.serve, "Only serve, until standard input ends");
  app.add_option("--connect", flags.connect, "Only fetch, from a server elsewhere");
  app.add_option("--listen", flags.listen, "Where to serve")->capture_default_str();
  app.add_option("--bytes", flags.bytes, "To move in each run")->check(CLI::PositiveNumber);
  app.add_option("--connections", flags.connections)->delimiter(',')->check(CLI::PositiveNumber);
  app.add_option("--payload-bytes", flags.payload_bytes)
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  app.add_option("--streams", flags.loop.streams, "On each connection")->check(CLI::PositiveNumber);
  app.add_option("--runs", flags.runs)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--arrival", flags.loop.arrival, "drop, copy, or copy and check the CRC-32C")
      ->transform(CLI::CheckedTransformer(kArrivals));
  app.add_flag("--plain", flags.plain, "gRPC's and malloc's defaults in the client");
  app.add_option("--waiting", flags.waiting, "callback, queue (a thread and a queue a stream)")
      ->delimiter(',')
      ->transform(CLI::CheckedTransformer(kWaitings));
  app.add_option("--argument", flags.arguments, "Channel argument of both ends: name=value");
  app.add_option("--client-argument", flags.client_arguments, "The same for the client");
  app.add_option("--server-argument", flags.server_arguments, "The same for the server");
  CLI11_PARSE(app, argc, argv);
  if (flags.serve) {
    Serve(flags, STDIN_FILENO, STDOUT_FILENO);
  } else if (!flags.connect.empty()) {
    Connect(flags, flags.connect, nullptr);
  } else {
    ServerProcess server(flags);
    Connect(flags, server.target(), &server);
  }
  return 0;
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) { return headstart::Run(argc, argv); }
