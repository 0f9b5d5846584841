#include "server/ops/span_exporter.h"

#include <algorithm>
#include <utility>

#include "kernels/base/instant.h"
#include "server/version.h"

namespace headstart {
namespace {

// What OTLP calls retryable.
bool MayWorkLater(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDataLoss:
      return true;
    default:
      return false;
  }
}

int64_t CountSpans(const TraceExport& batch) {
  return batch.resource_spans_size() == 0 ? 0 : batch.resource_spans(0).scope_spans(0).spans_size();
}

}  // namespace

SpanExporter::SpanExporter(const SpanExporterOptions& options, TraceResource resource,
                           std::unique_ptr<SpanSink> sink)
    : options_(options),
      resource_(std::move(resource)),
      sink_(std::move(sink)),
      thread_([this] { Run(); }) {}

SpanExporter::~SpanExporter() {
  bool ended = false;
  {
    MutexLock lock(&mutex_);
    end_by_ = Instant::Now() + options_.flush_timeout;
    changed_.SignalAll();
    while (!ended_ && Instant::Now() < end_by_) changed_.WaitUntil(&mutex_, end_by_);
    ended = ended_;
  }
  if (!ended) sink_->Cancel();
  thread_.join();
}

void SpanExporter::Push(std::vector<TraceSpan> spans) {
  MutexLock lock(&mutex_);
  if (waiting_.size() + spans.size() > options_.capacity) {
    dropped_ += static_cast<int64_t>(spans.size());
    return;
  }
  if (waiting_.empty()) oldest_at_ = Instant::Now();
  for (TraceSpan& span : spans) waiting_.push_back(std::move(span));
  changed_.SignalAll();
}

int64_t SpanExporter::exported() const {
  MutexLock lock(&mutex_);
  return exported_;
}

int64_t SpanExporter::dropped() const {
  MutexLock lock(&mutex_);
  return dropped_;
}

void SpanExporter::Run() {
  while (true) {
    const TraceExport batch = NextBatch();
    if (CountSpans(batch) == 0) break;
    absl::Duration backoff = options_.min_backoff;
    while (!TrySend(batch)) {
      if (!Pause(backoff)) {
        MutexLock lock(&mutex_);
        dropped_ += CountSpans(batch);
        break;
      }
      backoff = std::min(2 * backoff, options_.max_backoff);
    }
  }
  MutexLock lock(&mutex_);
  ended_ = true;
  changed_.SignalAll();
}

TraceExport SpanExporter::NextBatch() {
  TraceExport batch;
  MutexLock lock(&mutex_);
  while (end_by_ == Instant::InfiniteFuture() && waiting_.size() < options_.batch) {
    const Instant due =
        waiting_.empty() ? Instant::InfiniteFuture() : oldest_at_ + options_.interval;
    if (due <= Instant::Now()) break;
    changed_.WaitUntil(&mutex_, due);
  }
  if (waiting_.empty()) return batch;
  auto* of_resource = batch.add_resource_spans();
  *of_resource->mutable_resource() = resource_;
  auto* of_scope = of_resource->add_scope_spans();
  of_scope->mutable_scope()->set_name("headstart");
  of_scope->mutable_scope()->set_version(kVersion);
  for (size_t i = std::min(waiting_.size(), options_.batch); i > 0; --i) {
    *of_scope->add_spans() = std::move(waiting_.front());
    waiting_.pop_front();
  }
  return batch;
}

bool SpanExporter::TrySend(const TraceExport& batch) {
  Instant deadline = Instant::Now() + options_.send_timeout;
  {
    MutexLock lock(&mutex_);
    deadline = std::min(deadline, end_by_);
  }
  const absl::StatusOr<int64_t> refused = sink_->Send(batch, deadline);
  if (!refused.ok() && MayWorkLater(refused.status().code())) return false;
  const int64_t count = CountSpans(batch);
  const int64_t lost = refused.ok() ? std::clamp<int64_t>(*refused, 0, count) : count;
  MutexLock lock(&mutex_);
  exported_ += count - lost;
  dropped_ += lost;
  return true;
}

bool SpanExporter::Pause(absl::Duration time) {
  const Instant until = Instant::Now() + time;
  MutexLock lock(&mutex_);
  while (end_by_ == Instant::InfiniteFuture() && Instant::Now() < until) {
    changed_.WaitUntil(&mutex_, until);
  }
  return end_by_ == Instant::InfiniteFuture();
}

}  // namespace headstart
