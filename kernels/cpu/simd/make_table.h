// The table of this translation unit's instruction set. Internal linkage, see vec.h.
#pragma once

#include "kernels/cpu/simd/attention_row.h"
#include "kernels/cpu/simd/attention_tile.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/kernel_table.h"
#include "kernels/cpu/simd/selection_tile.h"

namespace headstart::simd {
namespace {

template <class Math>
constexpr KernelTable MakeTable() {
  using T = typename Math::Element;
  return {ElementKernelsFor<T>(),
          {PackedPageBytes<Math>, TileScratch<Math>::Bytes, PackK<Math>, PackV<Math>,
           AttentionTile<Math>, AttentionRow<Math>},
          SelectionKernelsFor<Math>()};
}

}  // namespace
}  // namespace headstart::simd
