//! Loads a plugin's shared object into the current process. Only the plugin host calls it.
//!
//! The only file of the daemon's crate with `unsafe` code.

use super::trust;
use fermata_plugin_api::CallError;
use fermata_plugin_api::abi::{PluginEntry, SYMBOL};
use fermata_plugin_api::host::PluginTable;
use std::path::Path;

/// Loads the shared object at `path`, after checking that no other user can have changed it.
///
/// It is never unloaded, since its threads may run until the process ends.
///
/// # Errors
/// `untrusted`, `not_loadable` or `no_entry`.
pub fn load(path: &Path) -> Result<PluginTable, CallError> {
    let real = trust::trusted_file(path)
        .map_err(|error| CallError::new("untrusted", fermata_protocol::error_chain(&error)))?;
    let not_loaded = |error: libloading::Error| {
        CallError::new(
            "not_loadable",
            format!("{} cannot be loaded: {}", real.display(), fermata_protocol::error_chain(&error)),
        )
    };
    // SAFETY: this runs the initialisers of a file that only root or the daemon's user can have installed, in a process
    // that has no other purpose.
    let library = unsafe { libloading::Library::new(&real) }.map_err(not_loaded)?;
    let table = {
        // SAFETY: by the plugin ABI a symbol of this name has this type.
        let entry = unsafe { library.get::<PluginEntry>(SYMBOL) }.map_err(|error| {
            CallError::new(
                "no_entry",
                format!("{} is not a plugin: {}", real.display(), fermata_protocol::error_chain(&error)),
            )
            .with_hint(format!("a plugin exports the function {SYMBOL}"))
        })?;
        // SAFETY: by the plugin ABI the entry may be called at any time; it takes no arguments.
        unsafe { entry() }
    };
    std::mem::forget(library);
    // SAFETY: the entry of a plugin returned the table, and the library stays loaded.
    unsafe { PluginTable::from_raw(table) }
}
