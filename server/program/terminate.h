// The end of a process that lacks memory or threads.
#pragma once

namespace headstart {

// From now on an exception that nobody catches, in any thread, ends the process with kExitRuntime
// and the reason when it says that memory or threads could not be had. Any other aborts, as before.
void EndWhereResourcesLack();

}  // namespace headstart
