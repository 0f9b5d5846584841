// Planted bugs: what stands around the scheduler does one thing wrong, so that a check of the model
// has something to find.
#pragma once

#include <cstdint>

namespace headstart::simulation {

enum class Mutation : uint8_t {
  kNone,
  kKeepDevicePages,    // pages of a prompt are never given back
  kWrongDevicePage,    // a step says a page that is not its request's
  kKeepHostChunk,      // the runner keeps a chunk that it was given
  kKeepSentChunk,      // a chunk is not let go when it was sent
  kCloseBehind,        // a shipment is closed past the scheduler
  kWrongReason,        // a cancelled request is ended as if its deadline had passed
  kRepeatPiece,        // a step says tokens that were computed before
  kPublishTwice,       // a chunk comes twice
  kLeaveOutChunk,      // a chunk does not come
  kSwapChunks,         // two chunks come in the wrong order
  kOverwriteChunk,     // the runner writes to a chunk that was published
  kForgetExpire,       // the scheduler is not told that time passes
  kLoseStep,           // a step that the scheduler made is not run
  kNeverStall,         // the limit for readers at rest is not the one that was asked for
  kWrongPriority,      // the scheduler is told another priority than was asked for
  kNoAgeing,           // who waits gets no older
  kLongPiece,          // a step says more tokens than a piece has
  kTwiceAtOnce,        // an urgent step holds a piece of the step around it
  kShareAcrossRoots,   // pages are named without their salt
  kForgetPage,         // the runner does not write a page
  kWrongState,         // the runner keeps the state of another moment
  kOverwriteShared,    // a step computes a page that was found
  kSlowerThanLearned,  // the scheduler is told a quarter of the time that steps took
  kAckUnsent,          // a reader acknowledges what it has not got
  kForgetEnd,          // an attached call that is over does not end its request
};

}  // namespace headstart::simulation
