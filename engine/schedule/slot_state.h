// What the device keeps of a request between two pieces.
#pragma once

#include <cstddef>
#include <vector>

namespace headstart {

// Beside its pages: see RequestSlot. Opaque.
using SlotState = std::vector<std::byte>;

}  // namespace headstart
