// Conversion of model weights at load time.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace headstart {

// out[i] = in[i] in `to`, rounded to nearest. `from`: kF32, kBF16 or kF16; `to`: kF32 or kBF16.
void ConvertElements(const void* in, DType from, int64_t count, void* out, DType to,
                     int32_t num_threads);

}  // namespace headstart
