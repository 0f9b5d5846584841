// One pass over a stored tensor: its checksum, and whether all values are finite.
#pragma once

#include <cstdint>

#include "engine/model/safetensors.h"

namespace headstart {

struct TensorScan {
  uint32_t crc32c = 0;           // of the bytes as stored (Castagnoli, as in iSCSI)
  int64_t first_nonfinite = -1;  // index of the first NaN or infinity; -1: all are finite
};

TensorScan ScanTensor(const StoredTensor& tensor);

}  // namespace headstart
