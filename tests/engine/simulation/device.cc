#include "tests/engine/simulation/device.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "tests/engine/simulation/stamp.h"

namespace headstart::simulation {
namespace {

SlotState StateOf(uint64_t content) {
  SlotState state(sizeof content);
  std::memcpy(state.data(), &content, sizeof content);
  return state;
}

}  // namespace

Device::Slot Device::Before(const Piece& piece) const {
  const int64_t pages = piece.first_position / kBlockTokens;
  return {piece.request, piece.first_position, pages == 0 ? 0 : ContentOf(piece, 0, pages - 1)};
}

void Device::CheckSlot(const Piece& piece, const RequestBook& request) {
  const Slot before = Before(piece);
  if (!piece.starts_slot) {
    if (slots_[static_cast<size_t>(piece.slot)] == before) return;
    return model_.Violate(Invariant::kContent,
                          absl::StrCat(request.id, ": the slot is not at ", piece.first_position));
  }
  const bool needs_state =
      piece.first_position > 0 && piece.attention != nullptr && !request.prefix.any_page;
  const bool is_right = needs_state
                            ? piece.state != nullptr && *piece.state == StateOf(before.content)
                            : piece.state == nullptr;
  if (!is_right) {
    model_.Violate(Invariant::kContent, absl::StrCat(request.id, ": begins at ",
                                                     piece.first_position, " with a wrong state"));
  }
}

void Device::Begin(const Piece& piece, const RequestBook& request) {
  if (piece.num_tokens() == 0) return;
  CheckSlot(piece, request);
  Clear(piece, request, piece.first_position);
}

void Device::Clear(const Piece& piece, const RequestBook& request, int64_t begin) {
  const int64_t end = NumBlocks(piece.first_position + piece.num_tokens());
  for (int64_t page = begin / kBlockTokens; page < end; ++page) {
    const int32_t index = piece.pages[static_cast<size_t>(page)];
    model_.CheckMayWrite(request, index);
    Forget(index);
  }
}

void Device::RunLayer(const Piece& piece, const RequestBook& request, int32_t layer) {
  int64_t position = 0;
  for (int64_t page = 0; position < piece.first_position; ++page, position += kBlockTokens) {
    if (ContentOf(piece, layer, page) == request.contents[static_cast<size_t>(page)]) continue;
    return model_.Violate(Invariant::kContent,
                          absl::StrCat(request.id, ": page ", page, " of layer ", layer,
                                       " is not what its tokens say"));
  }
  const uint64_t way = WayOf(piece.attention != nullptr, piece.ends_prompt, piece.prompt_tokens);
  const int64_t end = piece.first_position + piece.num_tokens();
  for (; position < end; position += kBlockTokens) {
    const int64_t page = position / kBlockTokens;
    const uint64_t before = page == 0 ? request.root_content : ContentOf(piece, layer, page - 1);
    contents_[static_cast<size_t>(layer)]
             [static_cast<size_t>(piece.pages[static_cast<size_t>(page)])] = ContentBehind(
                 before, piece.token_ids.subspan(position - piece.first_position, kBlockTokens),
                 way);
  }
}

std::shared_ptr<const SlotState> Device::End(const Piece& piece) {
  if (piece.num_tokens() == 0) return nullptr;
  const int64_t end = piece.first_position + piece.num_tokens();
  const uint64_t content = ContentOf(piece, 0, NumBlocks(end) - 1);
  slots_[static_cast<size_t>(piece.slot)] = {piece.request, end, content};
  return piece.keep_state ? std::make_shared<const SlotState>(StateOf(content)) : nullptr;
}

}  // namespace headstart::simulation
