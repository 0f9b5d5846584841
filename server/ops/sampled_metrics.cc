#include "server/ops/sampled_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

namespace headstart {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;

struct Sample {
  std::vector<ClientMetric::Label> labels;
  double value = 0;
};

MetricFamily Family(const MetricSpec& spec, const std::vector<Sample>& samples) {
  MetricFamily family;
  family.name = spec.name;
  family.help = spec.help;
  const bool counter = spec.type == MetricType::kCounter;
  family.type = counter ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge;
  for (const Sample& sample : samples) {
    ClientMetric metric;
    metric.label = sample.labels;
    (counter ? metric.counter.value : metric.gauge.value) = sample.value;
    family.metric.push_back(std::move(metric));
  }
  return family;
}

MetricFamily Single(const MetricSpec& spec, double value) { return Family(spec, {{{}, value}}); }

MetricFamily Number(const MetricSpec& spec, int64_t value) {
  return Single(spec, static_cast<double>(value));
}

std::vector<MetricFamily> SampleScheduler(const std::string& model, const MetricsSnapshot& s) {
  const auto of_model = [&model](const MetricSpec& spec, int64_t value) {
    return Family(spec, {{{{"model", model}}, static_cast<double>(value)}});
  };
  const auto of_kind = [&model](const char* kind, int64_t value) {
    return Sample{{{"model", model}, {"kind", kind}}, static_cast<double>(value)};
  };
  std::vector<Sample> drain;
  if (s.predicted_drain.has_value()) {
    drain.push_back({{{"model", model}}, absl::ToDoubleSeconds(*s.predicted_drain)});
  }
  return {
      of_model(metric::kQueueRequests, s.load.queued_requests),
      of_model(metric::kQueueTokens, s.load.queued_tokens),
      of_model(metric::kRunningRequests, s.load.inflight_requests - s.load.queued_requests),
      of_model(metric::kInflightTokens, s.load.inflight_tokens),
      of_model(metric::kQueueLimitRequests, s.max_queue_requests),
      of_model(metric::kQueueLimitTokens, s.max_queue_tokens),
      of_model(metric::kTicketsAcquired, s.load.acquired),
      of_model(metric::kTicketsReleased, s.load.released),
      Family(metric::kPredictedDrain, drain),
      Family(metric::kSteps, {of_kind("main", s.load.steps - s.load.urgent_steps),
                              of_kind("urgent", s.load.urgent_steps)}),
      of_model(metric::kStepPieces, s.load.pieces),
      of_model(metric::kKvRoomWaiting, s.load.waiting_for_room),
      of_model(metric::kKvLeases, s.load.leases),
      of_model(metric::kKvLeaseTokens, s.load.lease_tokens),
      of_model(metric::kKvLeasesExpired, s.load.leases_expired),
  };
}

std::vector<MetricFamily> SampleKvMemory(const MetricsSnapshot& s) {
  const auto in_state = [](const char* state, int64_t value) {
    return Sample{{{"state", state}}, static_cast<double>(value)};
  };
  const int64_t used = s.pool_blocks - s.pool_free;
  return {
      Family(metric::kKvPoolBlocks, {in_state("free", s.pool_free - s.pool_cached),
                                     in_state("cached", s.pool_cached), in_state("used", used)}),
      Number(metric::kKvPoolAcquired, s.pool_acquired),
      Number(metric::kKvPoolReleased, s.pool_released),
      Number(metric::kKvPoolEvictions, s.pool_evicted),
      Single(metric::kKvCacheUtilization,
             s.pool_blocks == 0 ? 0.0
                                : static_cast<double>(used) / static_cast<double>(s.pool_blocks)),
      Family(metric::kHostKvBytes, {in_state("free", s.host_kv_free_bytes),
                                    in_state("used", s.host_kv_bytes - s.host_kv_free_bytes)}),
  };
}

std::vector<MetricFamily> SampleTls(const MetricsSnapshot& s) {
  std::vector<Sample> not_after;
  const auto add = [&not_after](const char* certificate, const std::optional<int64_t>& time) {
    if (!time.has_value()) return;
    not_after.push_back({{{"certificate", certificate}}, static_cast<double>(*time)});
  };
  add("server", s.certificate_not_after);
  add("client_ca", s.client_ca_not_after);
  const auto looks = [](const char* result, int64_t count) {
    return Sample{{{"result", result}}, static_cast<double>(count)};
  };
  return {Family(metric::kTlsNotAfter, not_after),
          Family(metric::kTlsReloads, {looks("loaded", s.certificates_loaded),
                                       looks("rejected", s.certificates_rejected)})};
}

// Fields of /proc/self/stat from the third on: the second, the command's name, may hold blanks.
std::vector<std::string> StatFields() {
  std::ifstream file("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::istringstream rest(
      text.substr(text.rfind(')') == std::string::npos ? text.size() : text.rfind(')') + 1));
  return {std::istream_iterator<std::string>(rest), std::istream_iterator<std::string>()};
}

// Unix time when the machine started.
double BootTime() {
  std::ifstream file("/proc/stat");
  std::string word;
  while (file >> word) {
    double seconds = 0;
    if (word == "btime" && file >> seconds) return seconds;
  }
  return 0;
}

int64_t CountOpenFds() {
  std::error_code error;
  int64_t count = 0;
  for (std::filesystem::directory_iterator it("/proc/self/fd", error), end; !error && it != end;
       it.increment(error)) {
    ++count;
  }
  return count;
}

}  // namespace

std::vector<MetricFamily> SampleServer(const std::string& model, const MetricsSnapshot& s) {
  std::vector<MetricFamily> families = SampleScheduler(model, s);
  for (MetricFamily& family : SampleKvMemory(s)) families.push_back(std::move(family));
  for (MetricFamily& family : SampleTls(s)) families.push_back(std::move(family));
  const auto by_reason = [](const std::vector<std::pair<std::string, int64_t>>& counts) {
    std::vector<Sample> samples;
    for (const auto& [reason, count] : counts) {
      samples.push_back({{{"reason", reason}}, static_cast<double>(count)});
    }
    return samples;
  };
  for (MetricFamily family : {
           Number(metric::kReady, s.ready),
           Number(metric::kDraining, s.draining),
           Number(metric::kStuck, s.stuck),
           Number(metric::kDrainDeadline, s.drain_deadline),
           Number(metric::kLayersDone, s.layers_done),
           Number(metric::kConnections, s.connections),
           Number(metric::kConnectionsAccepted, s.connections_accepted),
           Family(metric::kConnectionsShed, by_reason(s.connections_shed)),
           Family(metric::kConnectionsCut, by_reason(s.connections_cut)),
           Number(metric::kTraceSpansExported, s.trace_spans_exported),
           Number(metric::kTraceSpansDropped, s.trace_spans_dropped),
       }) {
    families.push_back(std::move(family));
  }
  return families;
}

std::vector<MetricFamily> SampleProcess() {
  constexpr size_t kUserTime = 11, kSystemTime = 12, kThreads = 17, kStart = 19, kVirtual = 20,
                   kResident = 21;  // counted from the third field of proc(5)
  const std::vector<std::string> stat = StatFields();
  if (stat.size() <= kResident) return {};
  const auto field = [&stat](size_t index) { return std::strtod(stat[index].c_str(), nullptr); };
  const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  return {
      Single(metric::kProcessCpu, (field(kUserTime) + field(kSystemTime)) / ticks),
      Single(metric::kProcessResident,
             field(kResident) * static_cast<double>(sysconf(_SC_PAGESIZE))),
      Single(metric::kProcessVirtual, field(kVirtual)),
      Single(metric::kProcessOpenFds, static_cast<double>(CountOpenFds())),
      Single(metric::kProcessMaxFds, static_cast<double>(files.rlim_cur)),
      Single(metric::kProcessThreads, field(kThreads)),
      Single(metric::kProcessStart, BootTime() + field(kStart) / ticks),
  };
}

}  // namespace headstart
