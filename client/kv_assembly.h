// The KV of a prompt, or of a part of it, as it comes together from the streams that carry it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/kv_destination.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"

namespace headstart {

// What the caller knows beforehand. Zero and empty: anything will do.
struct KvExpectation {
  std::string request_id;
  std::string model;
  std::string model_hash;
  std::string token_hash;  // 32 bytes
  int64_t num_tokens = 0;
  int64_t num_layers = 0;  // of the model, as are the heads
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  v1::KvDtype dtype = v1::KV_DTYPE_UNSPECIFIED;
  bool dense = false;  // the request forbade sparse attention
  // Of the request: the KV of so many tokens in front does not come, nor need that of the pages
  // that are named in held_pages.
  int64_t skip_tokens = 0;
  std::string held_pages;
  std::string cache_salt;  // of the request, as is prefix_reuse
  v1::PrefixReuse prefix_reuse = v1::PREFIX_REUSE_SAME_ATTENTION;
  std::vector<uint32_t> token_ids;  // the prompt: names of pages are checked against it
};

// The callbacks run on the threads that read the streams, never two at a time; the streams stand
// still meanwhile. The first error ends the call with it. They must not use the client that calls
// them.
struct KvReceiverOptions {
  KvExpectation expected;
  // Of the call with its retries. Zero: the client's.
  absl::Duration timeout = absl::ZeroDuration();
  // A manifest that promises more is refused with RESOURCE_EXHAUSTED.
  int64_t max_kv_bytes = int64_t{64} << 30;

  std::function<absl::Status(const v1::Accepted&)> on_accepted;
  // Gives the memory for the KV, after the manifest was checked. Empty: the KV is checked and
  // dropped.
  std::function<absl::StatusOr<KvDestination>(const v1::KvManifest&, const KvShape&)> on_manifest;
  // KV bytes so far, and in all.
  std::function<void(int64_t, int64_t)> on_progress;
  // A layer is complete: all heads and tokens that come. `layer` is the model's number of it.
  std::function<absl::Status(int64_t layer)> on_layer;
};

// When the streams got somewhere; InfinitePast: not yet.
struct KvTimes {
  Instant manifest = Instant::InfinitePast();
  Instant first_chunk = Instant::InfinitePast();
  Instant last_chunk = Instant::InfinitePast();
  Instant first_token = Instant::InfinitePast();  // with the first stream that ended
  Instant completed = Instant::InfinitePast();    // with the last one
};

// Tokens that came, as ranges that neither overlap nor touch.
class TokenSet {
 public:
  // False, and nothing changes, when some of [begin, end) are in already.
  bool Insert(int64_t begin, int64_t end);

 private:
  std::map<int64_t, int64_t> end_of_;  // by the begin of the range
};

// Thread-safe: streams check their own messages (see KvReceiver), write to different places of the
// destination at the same time, and meet here. Every stream calls OnManifest before anything else.
class KvAssembly {
 public:
  // `part` says which layers and heads the streams carry together; its stripe means nothing here.
  explicit KvAssembly(KvReceiverOptions options, const v1::KvPart& part = {});

  // The first manifest is checked and on_manifest asked for memory; all others must equal it.
  absl::Status OnManifest(const v1::KvManifest& manifest);

  // Before a chunk is written: its tokens must not have come on any stream. `range` is inside the
  // shape.
  absl::Status Claim(const KvRange& range);
  // It was written, and its checksum is right.
  absl::Status Commit(const KvRange& range);

  // The first completion is checked against the manifest; all others must say the same of the
  // prompt.
  absl::Status OnCompleted(v1::Completed completed);

  // After all streams have ended well: nothing is missing.
  absl::Status CheckWhole() const;

  // Fixed once a stream's OnManifest has returned.
  const KvShape& shape() const { return shape_; }
  const KvDestination& destination() const { return destination_; }  // without layers: drop
  // Layers and heads as ranges that are not empty.
  const v1::KvPart& part() const { return part_; }

  const KvReceiverOptions& options() const { return options_; }
  int64_t num_chunks() const;
  int64_t kv_bytes() const;
  KvTimes times() const;
  // num_chunks and kv_bytes are those of all streams; the statistics are of the stream that the
  // server ended last.
  v1::Completed completed() const;

 private:
  absl::Status TakeManifest(const v1::KvManifest& manifest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const KvReceiverOptions options_;
  v1::KvPart part_;
  KvShape shape_;
  KvDestination destination_;

  mutable absl::Mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // of a callback: none is called again
  v1::KvManifest manifest_ ABSL_GUARDED_BY(mutex_);
  v1::Completed completed_ ABSL_GUARDED_BY(mutex_);
  std::vector<TokenSet> claimed_ ABSL_GUARDED_BY(mutex_);      // by layer
  std::vector<int64_t> layer_tokens_ ABSL_GUARDED_BY(mutex_);  // in place
  int64_t num_chunks_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t kv_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  KvTimes times_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
