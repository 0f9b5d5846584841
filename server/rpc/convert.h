// What a client asks for, as the engine's values.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/request.h"
#include "engine/ship/kv_part.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"
#include "server/rpc/served_model.h"

namespace headstart {

// INVALID_ARGUMENT (reason MALFORMED_REQUEST) when the bytes are no message of this type.
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);

// NOT_FOUND when `requested` is neither empty nor the model's name.
absl::Status CheckModelName(const std::string& requested, const std::string& served);

// 1 to 128 characters of [A-Za-z0-9._:-].
absl::Status CheckRequestId(const std::string& id);

// Everything of the request but its id, deadline and owner; its manifest is a serialised
// KvManifest, complete but for layer_density. Checks what the engine's Validate can't see: enums,
// dtype, sizes of opaque fields, ids that are no int32; then asks it. The status has its reason.
absl::StatusOr<PrefillRequest> ToRequest(const v1::PrefillRequest& request,
                                         const ServedModel& model);

// With every count that is left open filled in. INVALID_ARGUMENT: outside of the model; the message
// starts with `path`, the message's place in the request, and the field's name.
absl::StatusOr<KvPart> ToPart(absl::string_view path, const v1::KvPart& part,
                              const KvGeometry& geometry);

// As ToRequest, of a request that is not to be run. Where only num_tokens is known, for as many
// tokens of any kind, which hit no prefix.
absl::StatusOr<PrefillRequest> ToRequest(const v1::EstimateRequest& request,
                                         const ServedModel& model);

// When the prompt would have to be done. INVALID_ARGUMENT: no time.
absl::StatusOr<Instant> DeadlineOf(const v1::EstimateRequest& request,
                                   const ServerOptions& options);

// ProxyAttn was asked for, and the whole prompt runs dense because it is short.
bool IsBelowDenseLimit(const PrefillRequest& request);

}  // namespace headstart
