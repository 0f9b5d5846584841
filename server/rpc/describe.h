// What the server says about models, prompts and itself, as protobuf.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include "absl/time/time.h"
#include "engine/request.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/dtype.h"
#include "kernels/base/instant.h"
#include "server/rpc/served_model.h"

namespace headstart {

v1::KvDtype ToKvDtype(DType dtype);

// The manifest before compute: all but layer_density.
// What the names of pages start from: those of `request`'s attention; null: dense.
v1::CacheRoot ToCacheRoot(const std::string& salt, const PrefillRequest* request,
                          const ServedModel& model);

v1::EstimateResponse ToEstimate(const Estimate& estimate);
v1::GetLoadsResponse ToLoads(const ServedModel& model);

v1::KvManifest ToManifest(const PrefillRequest& request, const ServedModel& model);

// First token, manifest with densities, and statistics as of `now`. Number of chunks and bytes are
// the stream's to fill.
v1::Completed ToCompleted(const v1::KvManifest& manifest, const PrefillResult& result, Instant now);

v1::GetModelInfoResponse ToModelInfo(const ServedModel& model);
v1::GetServerInfoResponse ToServerInfo(const ServedModel& model, bool draining);

// Cut to what google.protobuf.Duration can say: 10 000 years either way.
void SetDuration(absl::Duration duration, google::protobuf::Duration* out);

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace headstart
