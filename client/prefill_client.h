// A client of a Headstart server, for decode nodes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cancel_token.h"
#include "client/client_options.h"
#include "client/kv_assembly.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace headstart {

class Connections;

// When things happened, counted from the start of the last attempt.
struct PrefillTiming {
  absl::Duration accepted;
  absl::Duration manifest;
  absl::Duration first_chunk;
  absl::Duration last_chunk;
  absl::Duration first_token;
  absl::Duration completed;  // by all streams
};

struct PrefillOutcome {
  v1::Accepted accepted;
  // First token, manifest with densities, statistics; num_chunks and kv_bytes of all streams.
  v1::Completed completed;
  PrefillTiming timing;
  int attempts = 1;
  int connections = 1;  // that the KV came on
  int resumes = 0;      // streams that broke and went on
};

// Detached KV on its server, as Accepted names it.
struct KvLocation {
  std::string fetch_id;
  std::string fetch_address = "";  // empty: the client's target
};

struct FetchOutcome {
  v1::Completed completed;  // num_chunks and kv_bytes of all streams
  int resumes = 0;
};

// Thread-safe; calls share connections. Several clients have several, also to the same server.
class PrefillClient {
 public:
  // INVALID_ARGUMENT: no target, a TLS file that can't be read, a number out of its range. Does not
  // connect yet.
  static absl::StatusOr<std::unique_ptr<PrefillClient>> Create(const PrefillClientOptions& options);
  ~PrefillClient();

  // Sends the prompt and receives its KV, on as many connections as the options say. What the
  // request says (tokens, model, dtype, dense, what is skipped, held and cached) is added to
  // `receive.expected`; the callbacks may see an attempt from its beginning again when it is
  // retried before its first chunk. `cancel` may be null. When it returns, nothing of the request
  // is left on the server.
  //   the server's status, with its details as payloads (see grpc_status.h)
  //   DATA_LOSS           a stream was wrong, or broke after its first chunk for good
  //   PERMISSION_DENIED   the server names a host to fetch from that is not allowed
  //   CANCELLED           by `cancel`
  //   DEADLINE_EXCEEDED   the timeout
  //   or what a callback returned
  //
  // A request with `detached` is only sent: on_accepted tells where its KV is, no KV comes, and
  // whoever fetches it releases it.
  absl::StatusOr<PrefillOutcome> Prefill(v1::PrefillRequest request, KvReceiverOptions receive,
                                         CancelToken* cancel = nullptr) const;

  // Receives a part of what another call of Prefill, in any process, made the server keep, as
  // `num_stripes` stripes on a connection each. Where readers were announced, the stripes must be
  // among them: see StripesOf. The destination is for the layers and heads of the part.
  // `receive.expected.skip_tokens` is that of the request, as are held_pages, which want the
  // prompt's token_ids. Streams that break go on; after an error nothing that came is of use.
  // Errors as those of Prefill.
  absl::StatusOr<FetchOutcome> Fetch(const KvLocation& location, const v1::KvPart& part,
                                     int num_stripes, KvReceiverOptions receive,
                                     CancelToken* cancel = nullptr) const;

  // Keeps the KV for another lease, whose length is returned.
  absl::StatusOr<absl::Duration> RenewLease(const KvLocation& location) const;
  // Gives the KV back.
  absl::Status ReleaseKv(const KvLocation& location) const;

  // What would become of a request now: nothing runs. Without a deadline the client's timeout is
  // meant. Answers also when the request would be refused; errors are those of a bad request.
  absl::StatusOr<v1::EstimateResponse> Estimate(const v1::EstimateRequest& request) const;
  // How busy the server is.
  absl::StatusOr<v1::GetLoadsResponse> GetLoads() const;

  absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo(const std::string& model = "") const;
  absl::StatusOr<v1::GetServerInfoResponse> GetServerInfo() const;

 private:
  PrefillClient(PrefillClientOptions options, std::unique_ptr<Connections> connections);

  // Connections for the KV of the request. Asks for the model once, where that matters.
  absl::StatusOr<int> ConnectionsFor(const v1::PrefillRequest& request, Instant deadline,
                                     CancelToken& cancel) const;
  absl::StatusOr<int64_t> KvBytesPerToken(const std::string& model, Instant deadline,
                                          CancelToken& cancel) const;
  absl::StatusOr<std::shared_ptr<grpc::Channel>> ChannelTo(const KvLocation& location) const;

  const PrefillClientOptions options_;
  const std::unique_ptr<Connections> connections_;
  mutable absl::Mutex mutex_;
  mutable std::map<std::string, int64_t> kv_bytes_per_token_ ABSL_GUARDED_BY(mutex_);  // by model
};

// The part as `count` stripes: what to announce in DetachedKv.readers for a Fetch of that many.
std::vector<v1::KvPart> StripesOf(const v1::KvPart& part, int count);

// Connections for so much KV: one for every 32 MiB, at most `max_connections`.
int AutomaticConnections(int64_t kv_bytes, int max_connections);

}  // namespace headstart
