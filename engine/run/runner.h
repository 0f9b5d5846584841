// Who runs steps: a device and the model on it, or in a simulation a table of times.
#pragma once

#include "engine/schedule/step.h"

namespace headstart {

class Runner {
 public:
  virtual ~Runner() = default;

  // Takes the step's pieces through the model, one call at a time. Their KV is published as it gets
  // ready; when this returns, all of it was, and nothing of the step is under way.
  virtual StepResult Run(Step& step) = 0;
};

}  // namespace headstart
