#include "client/kv_assembly.h"

#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/manifest_check.h"
#include "client/prefix_check.h"
#include "google/protobuf/util/message_differencer.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using google::protobuf::util::MessageDifferencer;

absl::Duration TotalTime(const v1::Completed& completed) {
  const google::protobuf::Duration& total = completed.statistics().total();
  return absl::Seconds(total.seconds()) + absl::Nanoseconds(total.nanos());
}

}  // namespace

bool TokenSet::Insert(int64_t begin, int64_t end) {
  const auto next = end_of_.lower_bound(begin);
  if (next != end_of_.end() && next->first < end) return false;
  const auto before = next == end_of_.begin() ? end_of_.end() : std::prev(next);
  if (before != end_of_.end() && before->second > begin) return false;
  if (next != end_of_.end() && next->first == end) {
    end = next->second;
    end_of_.erase(next);
  }
  if (before != end_of_.end() && before->second == begin) {
    before->second = end;
  } else {
    end_of_.emplace(begin, end);
  }
  return true;
}

KvAssembly::KvAssembly(KvReceiverOptions options, const v1::KvPart& part)
    : options_(std::move(options)), part_(part) {}

absl::Status KvAssembly::OnManifest(const v1::KvManifest& manifest) {
  absl::MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(failure_);
  if (manifest_.num_tokens() == 0) return failure_ = TakeManifest(manifest);
  if (MessageDifferencer::Equals(manifest_, manifest)) return absl::OkStatus();
  return absl::DataLossError("manifest: not the one of another stream of the same prompt");
}

absl::Status KvAssembly::TakeManifest(const v1::KvManifest& manifest) {
  HEADSTART_RETURN_IF_ERROR(CheckLayout(manifest));
  HEADSTART_RETURN_IF_ERROR(CheckExpectation(manifest, options_.expected));
  HEADSTART_RETURN_IF_ERROR(CheckPrefix(manifest, options_.expected));
  HEADSTART_ASSIGN_OR_RETURN(part_, WholeRanges(part_, manifest.layout()));
  shape_ = ShapeOfPart(manifest, part_);
  if (shape_.num_tokens > options_.max_kv_bytes / (shape_.num_layers * shape_.token_bytes())) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the KV of ", shape_.num_tokens, " tokens at ", shape_.num_layers * shape_.token_bytes(),
        " bytes is more than max_kv_bytes=", options_.max_kv_bytes));
  }
  if (options_.on_manifest) {
    HEADSTART_ASSIGN_OR_RETURN(destination_, options_.on_manifest(manifest, shape_));
    HEADSTART_RETURN_IF_ERROR(CheckDestination(destination_, shape_));
  }
  claimed_.resize(shape_.num_layers);
  layer_tokens_.assign(shape_.num_layers, 0);
  times_.manifest = Instant::Now();
  manifest_ = manifest;
  return absl::OkStatus();
}

absl::Status KvAssembly::Claim(const KvRange& range) {
  absl::MutexLock lock(&mutex_);
  if (claimed_[range.layer].Insert(range.token_begin, range.token_end())) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("some of its tokens, to ", range.token_end(), ", came before"));
}

absl::Status KvAssembly::Commit(const KvRange& range) {
  absl::MutexLock lock(&mutex_);
  HEADSTART_RETURN_IF_ERROR(failure_);
  times_.last_chunk = Instant::Now();
  if (num_chunks_++ == 0) times_.first_chunk = times_.last_chunk;
  kv_bytes_ += RangeBytes(shape_, range);
  MarkArrived(destination_, shape_, range);
  int64_t& tokens = layer_tokens_[range.layer];
  tokens += range.token_count;
  if (options_.on_progress) options_.on_progress(kv_bytes_, shape_.wire_bytes());
  if (tokens == shape_.num_tokens && options_.on_layer)
    failure_ = options_.on_layer(part_.layer_begin() + range.layer);
  return failure_;
}

absl::Status KvAssembly::OnCompleted(v1::Completed completed) {
  absl::MutexLock lock(&mutex_);
  if (!completed.has_first_token()) return absl::DataLossError("completed: no first_token");
  HEADSTART_RETURN_IF_ERROR(CheckFinalManifest(manifest_, completed.manifest(), options_.expected));
  if (completed_.has_first_token() &&
      !(MessageDifferencer::Equals(completed.first_token(), completed_.first_token()) &&
        MessageDifferencer::Equals(completed.manifest(), completed_.manifest()))) {
    return absl::DataLossError("completed: not what another stream of the same prompt says");
  }
  times_.completed = Instant::Now();
  if (!completed_.has_first_token()) times_.first_token = times_.completed;
  if (!completed_.has_first_token() || TotalTime(completed) > TotalTime(completed_))
    completed_ = std::move(completed);
  return absl::OkStatus();
}

absl::Status KvAssembly::CheckWhole() const {
  absl::MutexLock lock(&mutex_);
  if (!completed_.has_first_token())
    return absl::DataLossError("all streams ended, none with `completed`");
  if (kv_bytes_ == shape_.wire_bytes()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("completed after ", kv_bytes_, " of ", shape_.wire_bytes(), " KV bytes"));
}

int64_t KvAssembly::num_chunks() const {
  absl::MutexLock lock(&mutex_);
  return num_chunks_;
}

int64_t KvAssembly::kv_bytes() const {
  absl::MutexLock lock(&mutex_);
  return kv_bytes_;
}

KvTimes KvAssembly::times() const {
  absl::MutexLock lock(&mutex_);
  return times_;
}

v1::Completed KvAssembly::completed() const {
  absl::MutexLock lock(&mutex_);
  v1::Completed completed = completed_;
  completed.set_num_chunks(static_cast<uint32_t>(num_chunks_));
  completed.set_kv_bytes(kv_bytes_);
  return completed;
}

}  // namespace headstart
