// Between protobuf and the engine: no other file knows both.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <string>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "engine/prefill_job.h"
#include "headstart/v1/prefill.pb.h"
#include "server/options.h"
#include "server/rpc/attention_request.h"

namespace headstart {

// What the server serves once it has loaded it. Engine and options outlive every request.
struct ServedModel {
  Engine* engine = nullptr;
  std::string name;
  const ServerOptions* options = nullptr;
  ResolvedAttention default_attention;
};

// INVALID_ARGUMENT (reason MALFORMED_REQUEST) when the bytes are no message of this type.
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);
grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

// NOT_FOUND when `requested` is neither empty nor the model's name.
absl::Status CheckModelName(const std::string& requested, const std::string& served);

// 1 to 128 characters of [A-Za-z0-9._:-].
absl::Status CheckRequestId(const std::string& id);

// Fills everything of the job but its id and deadline. Checks what the engine's Validate can't see:
// enums, dtype, sizes of opaque fields, ids that are no int32; then asks it. The status has its
// reason.
absl::Status FillJob(const v1::PrefillRequest& request, const ServedModel& model, PrefillJob* job);

// The manifest before compute: all but layer_density.
v1::KvManifest ToManifest(const PrefillJob& job, const ServedModel& model);

// First token, manifest with densities and the counts of the statistics. Durations, number of
// chunks, bytes and the checksum are the stream's to fill.
v1::Completed ToCompleted(const v1::KvManifest& manifest, const PrefillResult& result);

v1::GetModelInfoResponse ToModelInfo(const ServedModel& model);
v1::GetServerInfoResponse ToServerInfo(const ServedModel& model, bool draining);

void SetDuration(absl::Duration duration, google::protobuf::Duration* out);

}  // namespace headstart
