//! Loads a plugin's shared object into *this* process: only ever called by the plugin host.
//!
//! The only file of the library besides `os` that may use `unsafe`.

use super::trust;
use fermata_plugin_api::CallError;
use fermata_plugin_api::abi::{PluginEntry, SYMBOL};
use fermata_plugin_api::host::PluginTable;
use std::path::Path;

/// Loads the shared object at `path`, after checking who could have written it.
///
/// It is never unloaded: its threads and its functions may be in use until the process ends.
pub fn load(path: &Path) -> Result<PluginTable, CallError> {
    let real = trust::trusted_file(path)
        .map_err(|error| CallError::new("untrusted", fermata_protocol::error_chain(&error)))?;
    let not_loaded = |error: libloading::Error| {
        CallError::new(
            "not_loadable",
            format!("{} cannot be loaded: {}", real.display(), fermata_protocol::error_chain(&error)),
        )
    };
    // SAFETY: running the initialisers of a file that only root or the daemon's user can have
    // put there is what the administrator asked for; this process is there to bear the risk.
    let library = unsafe { libloading::Library::new(&real) }.map_err(not_loaded)?;
    let table = {
        // SAFETY: a shared object that exports this name promises this type.
        let entry = unsafe { library.get::<PluginEntry>(SYMBOL) }.map_err(|error| {
            CallError::new(
                "no_entry",
                format!("{} is no plugin: {}", real.display(), fermata_protocol::error_chain(&error)),
            )
            .with_hint(format!("a plugin exports the function {SYMBOL}"))
        })?;
        // SAFETY: as above; the entry takes no arguments.
        unsafe { entry() }
    };
    std::mem::forget(library);
    // SAFETY: the entry returned it, and the library stays loaded.
    unsafe { PluginTable::from_raw(table) }
}
