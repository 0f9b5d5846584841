// Checks of what a manifest says about the start of a prompt: what is skipped, what was cached, and
// how its pages are named.
#pragma once

#include "absl/status/status.h"
#include "client/kv_assembly.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// DATA_LOSS when the manifest skips less than was asked for, all of it, or more than the pages that
// the client holds; when its pages may be another tenant's, or of attention that was refused.
// REQUIRES: CheckLayout and CheckExpectation passed.
absl::Status CheckPrefix(const v1::KvManifest& manifest, const KvExpectation& expected);

// The same of a final manifest's cached tokens and names of pages. Names are computed again where
// the prompt is known. REQUIRES: CheckLayout passed.
absl::Status CheckCachedPrefix(const v1::KvManifest& manifest, const KvExpectation& expected);

}  // namespace headstart
