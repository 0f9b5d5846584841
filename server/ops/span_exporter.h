// Takes finished spans and sends them on, from a thread of its own: whoever makes them never waits.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"
#include "opentelemetry/proto/collector/trace/v1/trace_service.pb.h"

namespace headstart {

using TraceSpan = opentelemetry::proto::trace::v1::Span;
using TraceResource = opentelemetry::proto::resource::v1::Resource;
using TraceExport = opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;

// Where spans go to. Called by one thread, Cancel by another one.
class SpanSink {
 public:
  virtual ~SpanSink() = default;
  // How many of the spans were refused. An error: none was taken, as far as is known.
  virtual absl::StatusOr<int64_t> Send(const TraceExport& spans, Instant deadline) = 0;
  // A Send that waits ends soon, and every later one at once.
  virtual void Cancel() = 0;
};

struct SpanExporterOptions {
  size_t capacity = 4096;  // spans that wait; more are dropped
  size_t batch = 512;
  absl::Duration interval = absl::Seconds(1);  // a smaller batch goes after this
  absl::Duration send_timeout = absl::Seconds(10);
  // Between tries of a batch, doubled each time.
  absl::Duration min_backoff = absl::Seconds(1);
  absl::Duration max_backoff = absl::Seconds(30);
  absl::Duration flush_timeout = absl::Seconds(1);  // at the end
};

class SpanExporter {
 public:
  SpanExporter(const SpanExporterOptions& options, TraceResource resource,
               std::unique_ptr<SpanSink> sink);
  // Sends what is left, as far as that works within flush_timeout.
  ~SpanExporter();
  SpanExporter(const SpanExporter&) = delete;
  SpanExporter& operator=(const SpanExporter&) = delete;

  // Thread-safe; waits for nobody. All of them or, without room, none: traces are whole or absent.
  void Push(std::vector<TraceSpan> spans);

  // Since the start. Every span that was pushed ends as one of these.
  int64_t exported() const;
  int64_t dropped() const;

 private:
  void Run();
  // Empty: the end.
  TraceExport NextBatch();
  // False: not now, try again.
  bool TrySend(const TraceExport& batch);
  // False: the exporter ends.
  bool Pause(absl::Duration time);

  const SpanExporterOptions options_;
  const TraceResource resource_;
  const std::unique_ptr<SpanSink> sink_;

  mutable Mutex mutex_;
  CondVar changed_;
  std::deque<TraceSpan> waiting_ ABSL_GUARDED_BY(mutex_);
  Instant oldest_at_ ABSL_GUARDED_BY(mutex_) =
      Instant::InfiniteFuture();  // no later than any that waits
  int64_t exported_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t dropped_ ABSL_GUARDED_BY(mutex_) = 0;
  Instant end_by_ ABSL_GUARDED_BY(mutex_) = Instant::InfiniteFuture();  // set once it ends
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headstart
