//! Plugin host processes: deadlines, restarts, quarantine.
//!
//! The daemon never loads a plugin itself. Each one lives in a `fermata-plugin-host` process; what
//! it does wrong there (crash, hang, leak, garbage) ends that process and is told in `plugin ls`.
//!
//! ```text
//!   registry    Plugins: the map of names; list, reload, enable, checkpoint_save, notify
//!      |  holds
//!   entry       one plugin as it was found, with its queues
//!      |  one mailbox and one event queue each
//!   supervisor  one task per plugin: start, one call at a time, deadlines, crashes
//!      |  owns
//!   process     one host process: frames, exit, kill        (the daemon's side)
//!  - - - - - - - - - - - - - - descriptor 3 - - - - - - - - - - - - - -
//!   host        the program around the plugin               (the host's side)
//!   loader      dlopen, the only unsafe code here
//! ```
//!
//! `config` finds plugins and reads their settings, `trust` says whose files may be used, `crash`
//! decides about restarts, `artifact` checks what a plugin has left for a checkpoint, `output`
//! bounds what it prints. Nothing here knows the store, the protocol or the projects.

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
pub use config::{ConfigError, PluginConfig};
pub use crash::CrashPolicy;
pub use fermata_plugin_api::{
    AgentProcess, CallError, Description, PluginKind, RestoreReply, RestoreRequest, SaveRequest,
};
pub use registry::{PluginError, Plugins, ReloadReport};
pub use status::{PluginState, PluginStatus};

/// Runs work that touches the disk off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
