// Which build this is.
#pragma once

namespace headstart {

// The project's version, and behind it which commit it was made from when that is not the release's
// own: 0.1.0, 0.1.0-5-g1a2b3c4d5e6f, 0.1.0-g1a2b3c4d5e6f-dirty.
extern const char* const kVersion;

}  // namespace headstart
