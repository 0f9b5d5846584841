// Checks of a manifest, before anything relies on its numbers.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kv_assembly.h"
#include "client/kv_destination.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// Bytes of an element; 0 for a value that names no type.
int64_t KvDtypeBytes(v1::KvDtype dtype);

// DATA_LOSS when the layout makes no sense. What passes is so small that the bytes of a token of
// the whole model can be computed without overflow.
absl::Status CheckLayout(const v1::KvManifest& manifest);

// DATA_LOSS names the first field that is not what was expected.
absl::Status CheckExpectation(const v1::KvManifest& manifest, const KvExpectation& expected);

// The part with its counts filled in. INVALID_ARGUMENT when it reaches beyond the layout.
absl::StatusOr<v1::KvPart> WholeRanges(v1::KvPart part, const v1::KvLayout& layout);

// What comes of the part. REQUIRES: CheckLayout, CheckPrefix and WholeRanges passed.
KvShape ShapeOfPart(const v1::KvManifest& manifest, const v1::KvPart& part);

// `last` is what `first` was, with a density in (0, 1] for every layer, and a cached prefix that
// makes sense (CheckCachedPrefix).
absl::Status CheckFinalManifest(const v1::KvManifest& first, const v1::KvManifest& last,
                                const KvExpectation& expected);

}  // namespace headstart
