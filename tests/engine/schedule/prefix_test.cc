// Prompts that begin alike.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/engine/schedule/scheduler_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

enum class Kind : uint8_t { kDense, kSparse, kDenseStart };

class PrefixTest : public SchedulerTest {
 protected:
  // A prompt of `num_tokens`, of which the first `shared` are those of all others.
  static PrefillRequest Prompt(const std::string& id, int64_t num_tokens, int64_t shared,
                               Kind kind = Kind::kDense, const std::string& salt = "") {
    PrefillRequest request = Request(id, num_tokens);
    for (int64_t i = 0; i < num_tokens; ++i) {
      request.token_ids[i] = static_cast<int32_t>(i < shared ? i : i + 1000 * id[0]);
    }
    request.attention.enabled = kind != Kind::kDense;
    request.prefix.cache_root = absl::StrCat(kind == Kind::kSparse ? "sparse" : "dense", salt);
    request.prefix.keeps_pages = kind != Kind::kDenseStart;
    request.prefix.any_page = kind != Kind::kSparse;
    request.page_names = HashPages("model", *request.prefix.cache_root, request.token_ids,
                                   NamedTokens(request, kPiece) / kBlockTokens);
    return request;
  }

  struct Computed {
    std::vector<std::pair<int64_t, int64_t>> pieces;  // first position, tokens
    int64_t chunks = 0;
  };
  // Runs what there is, one prompt.
  Computed Run() {
    Computed computed;
    while (std::optional<Step> step = scheduler_->Next(now_)) {
      for (const Piece& piece : step->pieces) {
        if (piece.num_tokens() > 0) {
          computed.pieces.emplace_back(piece.first_position, piece.num_tokens());
        }
        computed.chunks += static_cast<int64_t>(piece.host.size());
      }
      Finish(*step);
    }
    return computed;
  }
  Computed Run(PrefillRequest request) {
    const Admitted admitted = MustAdd(std::move(request));
    const Computed computed = Run();
    scheduler_->End(admitted.key, absl::CancelledError("done"));
    return computed;
  }
  static std::shared_ptr<const PrefillResult> ResultOf(const Admitted& admitted) {
    auto reader = admitted.shipment->Open(std::nullopt, 0);
    ShipmentReader::Event event = (*reader)->Next();
    while (!std::holds_alternative<ShipmentReader::Ended>(event)) event = (*reader)->Next();
    return std::get<ShipmentReader::Ended>(event).result;
  }
};

TEST_F(PrefixTest, DenseStartIsFoundUpToAnyPage) {
  Run(Prompt("a", 700, 700));
  const Admitted b = MustAdd(Prompt("b", 700, 400));
  EXPECT_EQ(b.estimate.cached_tokens, 384);
  const Computed computed = Run();
  EXPECT_THAT(computed.pieces, ElementsAre(std::pair(384, 128), std::pair(512, 188)));
  EXPECT_EQ(computed.chunks, 2 * 6);  // all of it ships
  EXPECT_EQ(ResultOf(b)->cached_tokens, 384);
  EXPECT_THAT(ResultOf(b)->page_hashes, SizeIs(5 * 16));
}

TEST_F(PrefixTest, TheSamePromptComputesItsLastPage) {
  Run(Prompt("a", 512, 512));
  EXPECT_THAT(Run(Prompt("b", 512, 512)).pieces, ElementsAre(std::pair(384, 128)));
}

TEST_F(PrefixTest, SparseStartIsFoundUpToABorder) {
  Run(Prompt("a", 3 * kPiece, 3 * kPiece, Kind::kSparse));
  const Computed computed = Run(Prompt("b", 3 * kPiece, 2 * kPiece + 400, Kind::kSparse));
  EXPECT_THAT(computed.pieces, ElementsAre(std::pair(2 * kPiece, kPiece)));
}

TEST_F(PrefixTest, SparseLastPieceIsNotKept) {
  Run(Prompt("a", 2 * kPiece, 2 * kPiece, Kind::kSparse));
  const Computed computed = Run(Prompt("b", 3 * kPiece, 2 * kPiece, Kind::kSparse));
  EXPECT_THAT(computed.pieces,
              ElementsAre(std::pair(kPiece, kPiece), std::pair(2 * kPiece, kPiece)));
}

TEST_F(PrefixTest, SparseStartBringsItsState) {
  Run(Prompt("a", 3 * kPiece, 3 * kPiece, Kind::kSparse));
  MustAdd(Prompt("b", 3 * kPiece, 3 * kPiece, Kind::kSparse));
  std::optional<Step> step = scheduler_->Next(now_);
  while (step.has_value() && step->pieces[0].num_tokens() == 0) {  // copies
    Finish(*step);
    step = scheduler_->Next(now_);
  }
  ASSERT_TRUE(step.has_value());
  EXPECT_TRUE(step->pieces[0].starts_slot);
  EXPECT_NE(step->pieces[0].state, nullptr);
}

TEST_F(PrefixTest, SparseAndDenseAreNotMixed) {
  Run(Prompt("a", 3 * kPiece, 3 * kPiece, Kind::kSparse));
  EXPECT_EQ(MustAdd(Prompt("b", 3 * kPiece, 3 * kPiece)).estimate.cached_tokens, 0);
  Run();
  EXPECT_EQ(MustAdd(Prompt("c", 4 * kPiece, 3 * kPiece, Kind::kSparse)).estimate.cached_tokens,
            2 * kPiece);
}

TEST_F(PrefixTest, DenseStartOfASparsePromptOnRequest) {
  Run(Prompt("a", 700, 700));
  const Admitted b = MustAdd(Prompt("b", 1000, 700, Kind::kDenseStart));
  EXPECT_THAT(Run().pieces, ElementsAre(std::pair(640, 360)));
  EXPECT_THAT(ResultOf(b)->page_hashes, SizeIs(5 * 16));  // what follows has no name
  Run(Prompt("c", 1000, 1000));
  // Nor is it found by others.
  EXPECT_EQ(MustAdd(Prompt("d", 1000, 1000)).estimate.cached_tokens, 896);
}

TEST_F(PrefixTest, SaltsDoNotMeet) {
  Run(Prompt("a", 700, 700, Kind::kDense, "tenant 1"));
  EXPECT_EQ(MustAdd(Prompt("b", 700, 700, Kind::kDense, "tenant 2")).estimate.cached_tokens, 0);
  EXPECT_EQ(MustAdd(Prompt("c", 700, 700, Kind::kDense, "tenant 1")).estimate.cached_tokens, 640);
}

TEST_F(PrefixTest, PagesAreSharedWhileBothRun) {
  Run(Prompt("a", 512, 512));
  MustAdd(Prompt("b", 512, 384));
  MustAdd(Prompt("c", 512, 384));
  const std::optional<Step> step = scheduler_->Next(now_);
  ASSERT_EQ(step->pieces.size(), 2);
  for (int page = 0; page < 3; ++page) {
    EXPECT_EQ(step->pieces[0].pages[page], step->pieces[1].pages[page]);
  }
  EXPECT_NE(step->pieces[0].pages[3], step->pieces[1].pages[3]);
}

TEST_F(PrefixTest, WhoNeedsWhatAnotherComputesWaitsForIt) {
  const uint64_t a = MustAdd(Prompt("a", 200, 128)).key;
  const uint64_t b = MustAdd(Prompt("b", 200, 128)).key;
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(a));  // though both would fit
  EXPECT_FALSE(scheduler_->NextUrgent(*step, now_).has_value());
  Finish(*step);
  step = scheduler_->Next(now_);
  ASSERT_THAT(KeysOf(step), ElementsAre(b));
  EXPECT_EQ(step->pieces[0].first_position, 128);
}

TEST_F(PrefixTest, TakesOverWhenTheOtherFails) {
  MustAdd(Prompt("a", 200, 128));
  const uint64_t b = MustAdd(Prompt("b", 200, 128)).key;
  Fail(*scheduler_->Next(now_), absl::ResourceExhaustedError("out of memory"));
  const std::optional<Step> step = scheduler_->Next(now_);
  ASSERT_THAT(KeysOf(step), ElementsAre(b));
  EXPECT_EQ(step->pieces[0].first_position, 0);
}

TEST_F(PrefixTest, FindsWhatCameWhileItRan) {
  const uint64_t a = MustAdd(Prompt("a", 3 * kPiece, 3 * kPiece)).key;
  std::optional<Step> step = scheduler_->Next(now_);
  Finish(*step);  // a: one piece
  const uint64_t b = MustAdd(Prompt("b", 3 * kPiece, 3 * kPiece)).key;
  std::vector<uint64_t> computed_by;
  while ((step = scheduler_->Next(now_)).has_value()) {
    for (const Piece& piece : step->pieces) {
      if (piece.num_tokens() > 0) computed_by.push_back(piece.request);
    }
    Finish(*step);
  }
  // Each piece is computed once, but for the last page, that everybody computes.
  EXPECT_THAT(computed_by, ::testing::UnorderedElementsAre(a, a, b));
}

TEST_F(PrefixTest, EvictedWhileARequestWantsIt) {
  Make(SmallOptions(), {.pages = 8});
  Run(Prompt("a", 500, 500));  // 3 named pages stay
  const Admitted b = MustAdd(Prompt("b", 500, 500));
  EXPECT_EQ(b.estimate.cached_tokens, 384);
  PrefillRequest other = Prompt("c", 1000, 0);
  other.priority = 1;
  const Admitted c = MustAdd(std::move(other));  // needs all pages
  std::optional<Step> step = scheduler_->Next(now_);
  EXPECT_THAT(KeysOf(step), ElementsAre(c.key));
  Fail(*step, absl::CancelledError("gone"));
  step = scheduler_->Next(now_);
  ASSERT_THAT(KeysOf(step), ElementsAre(b.key));
  EXPECT_EQ(step->pieces[0].first_position, 0);
}

TEST_F(PrefixTest, OnlyWhatIsWantedShips) {
  Run(Prompt("a", 3 * kPiece, 3 * kPiece));
  PrefillRequest request = Prompt("b", 3 * kPiece, 2 * kPiece + 256);
  request.skip_tokens = 2 * kPiece + 256;
  const Computed computed = Run(std::move(request));
  EXPECT_THAT(computed.pieces, ElementsAre(std::pair(2 * kPiece + 256, 256)));
  EXPECT_EQ(computed.chunks, 2 * 2);
}

TEST_F(PrefixTest, WithoutARootNothingIsFoundOrKept) {
  PrefillRequest first = Prompt("a", 700, 700);
  first.prefix.cache_root.reset();
  first.page_names.clear();
  Run(std::move(first));
  EXPECT_EQ(pages_->cached_pages(), 0);
  EXPECT_EQ(MustAdd(Prompt("b", 700, 700)).estimate.cached_tokens, 0);
}

TEST_F(PrefixTest, CountsWhatWasFound) {
  Run(Prompt("a", 700, 700));
  Run(Prompt("b", 700, 700));
  EXPECT_EQ(scheduler_->load().prompt_tokens, 1400);
  EXPECT_EQ(scheduler_->load().cached_tokens, 640);
  ExpectNothingLeft();
}

TEST(CountHeldTest, CountsFromTheStartOnly) {
  const std::vector<int32_t> ids(512, 7);
  const std::vector<PageHash> names = HashPages("model", "root", ids, 4);
  const auto bytes = [&](std::vector<int> which) {
    std::string out;
    for (const int i : which) out.append(names[i].bytes.begin(), names[i].bytes.end());
    return out;
  };
  EXPECT_EQ(CountHeld(names, ""), 0);
  EXPECT_EQ(CountHeld(names, bytes({1, 2, 3})), 0);
  EXPECT_EQ(CountHeld(names, bytes({3, 1, 0})), 2);
  EXPECT_EQ(CountHeld(names, bytes({0, 1, 2, 3})), 4);
}

}  // namespace
}  // namespace headstart
