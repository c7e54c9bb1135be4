//! Plugin host processes: calls with deadlines, restarts, quarantine.
//!
//! The daemon never loads a plugin itself. Each plugin runs in a `fermata-plugin-host` process; an error of the plugin
//! (crash, hang, memory leak, invalid frame) ends only that process and is shown by `plugin ls`.
//!
//! ```text
//!   registry    Plugins: the plugins by name; list, reload, enable, checkpoint_save, notify
//!      |  owns
//!   entry       one plugin as it was found on disk, with its queues
//!      |  one request queue and one event queue each
//!   supervisor  one task per plugin: start, one call at a time, deadlines, crashes
//!      |  owns
//!   process     one host process: frames, exit, kill        (the daemon's side)
//!  - - - - - - - - - - - - - - descriptor 3 - - - - - - - - - - - - - -
//!   host        the program that runs the plugin            (the host's side)
//!   loader      dlopen, the only unsafe code here
//! ```
//!
//! `config` finds plugins and reads their settings, `trust` checks who can change a file, `crash` decides about restarts,
//! `artifact` checks the files that a plugin adds to a checkpoint, `output` limits what a plugin prints. These modules do
//! not use the store or the projects.

pub mod artifact;
pub mod config;
pub mod crash;
mod entry;
pub mod frame;
pub mod host;
#[allow(unsafe_code)]
mod loader;
pub mod output;
mod process;
mod registry;
pub mod status;
mod supervisor;
pub mod trust;

pub use artifact::{PluginArtifact, PluginFailure};
pub use config::{PluginConfig, PluginConfigError};
pub use crash::CrashPolicy;
pub use fermata_plugin_api::{
    AgentProcess, CallError, Description, PluginKind, RestoreReply, RestoreRequest, SaveRequest,
};
pub use registry::{PluginError, Plugins, ReloadReport};
pub use status::{HostState, PluginStatus};

/// Runs blocking work on a thread for it. A panic of `work` continues in the caller.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down and cancels this task too.
            Err(_) => std::future::pending().await,
        },
    }
}
