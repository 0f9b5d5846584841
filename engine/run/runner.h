// Who runs steps: a device and the model on it, or in a simulation a table of times.
#pragma once

#include <cstdint>
#include <optional>

#include "engine/schedule/step.h"

namespace headstart {

// Asked between two layers for a step that must not wait for the one that runs. It runs whole
// there, in memory of its own; nobody asks between its layers.
class UrgentWork {
 public:
  virtual ~UrgentWork() = default;
  virtual std::optional<Step> Next() = 0;
  virtual void Finish(Step step, StepResult result) = 0;
};

class Runner {
 public:
  virtual ~Runner() = default;

  // Takes the step's pieces through the model, one call at a time. Their KV is published as it gets
  // ready; when this returns, all of it was, and nothing of the step is under way. `urgent` may be
  // null.
  virtual StepResult Run(Step& step, UrgentWork* urgent) = 0;

  // Layers finished since the start, all requests together. Thread-safe.
  virtual int64_t layers_done() const = 0;
};

}  // namespace headstart
