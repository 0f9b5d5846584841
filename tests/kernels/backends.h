// The backends that the kernel tests hold to the reference.
#pragma once

#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace headstart::testing {

// A backend as tests open it.
struct BackendCase {
  std::string name;
  BackendOptions options;
  std::string cpu_isa;  // HEADSTART_CPU_ISA; empty: the machine's best
};

// All that any build can have: bf16 and f32, f32 on every instruction set, CUDA.
std::vector<BackendCase> BackendsUnderTest();
inline std::string NameOf(const BackendCase& backend) { return backend.name; }
void PrintTo(const BackendCase& backend, std::ostream* os);

// Sets HEADSTART_CPU_ISA and makes the backend.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const BackendCase& backend);
// One of BackendsUnderTest() by its name; NOT_FOUND when there is none.
absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(absl::string_view name);
// Whether OpenBackend failed because the build or the machine lacks the device or its instructions.
bool IsMissingHere(const absl::Status& status);

}  // namespace headstart::testing
