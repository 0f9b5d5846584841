// Shows how far loading a model has come.
#pragma once

#include "engine/model/weights.h"
#include "server/options.h"

namespace headstart {

// A bar on standard error when that is a terminal, the log is text and NO_COLOR is not set; else a
// log line every ten percent.
LoadProgress MakeLoadProgress(LogFormat format);

}  // namespace headstart
