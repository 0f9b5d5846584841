// Checks of a manifest, before anything relies on its numbers.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kv_destination.h"
#include "client/kv_receiver.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// The shape that the manifest promises, its sizes proven to be in range. DATA_LOSS when it makes no
// sense; RESOURCE_EXHAUSTED when the KV is larger than max_kv_bytes.
absl::StatusOr<KvShape> CheckedShape(const v1::KvManifest& manifest, int64_t max_kv_bytes);

// DATA_LOSS names the first field that is not what was expected.
absl::Status CheckExpectation(const v1::KvManifest& manifest, const KvExpectation& expected);

// `last` is what `first` was, with a density in (0, 1] for every layer.
absl::Status CheckFinalManifest(const v1::KvManifest& first, const v1::KvManifest& last);

}  // namespace headstart
