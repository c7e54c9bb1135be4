//! `plugin …`.

use fermata_protocol::plugin::{PluginCheck, PluginEnable, PluginList, PluginReload, PluginState, PluginView};

use crate::cli::groups::PluginCommand;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Cell, FieldList, Paint, TextTable};
use crate::paths::{canonical, to_utf8};
use crate::session::DaemonSession;

pub fn run(session: &mut DaemonSession, command: PluginCommand) -> CommandResult {
    let plugins = match command {
        PluginCommand::Ls => session.call(&PluginList {})?.plugins,
        PluginCommand::Reload => session.call(&PluginReload {})?.plugins,
        PluginCommand::Enable { name } => enable(name, true, session)?,
        PluginCommand::Disable { name } => enable(name, false, session)?,
        PluginCommand::Check { path } => {
            let path = to_utf8(&canonical(&path)?)?;
            let plugin = session.call(&PluginCheck { path })?;
            session.out.object(&plugin, Some(plugin.name.clone()), |out, plugin| {
                let fields = FieldList::default()
                    .add("plugin", &plugin.name)
                    .add("version", &plugin.version)
                    .add("kinds", plugin.kinds.join(", "));
                out.fields(&fields)
            })?;
            return Ok(0);
        }
    };
    let name = |plugin: &PluginView| plugin.name.clone();
    session.out.rows(&plugins, "no plugins", name, |out, plugins| {
        let mut table =
            TextTable::new(&["PLUGIN", "STATE", "KINDS", "VERSION", ">CALLS", ">RESTARTS", "SINCE", "LAST ERROR"]);
        for plugin in plugins {
            table.row([
                Cell::from(&plugin.name),
                state(plugin.state),
                plugin.kinds.join(",").into(),
                plugin.version.as_deref().unwrap_or("").into(),
                plugin.calls.to_string().into(),
                plugin.restarts.to_string().into(),
                out.ago(plugin.since).into(),
                plugin.last_error.as_deref().unwrap_or("").into(),
            ]);
        }
        table
    })?;
    Ok(0)
}

fn enable(name: String, enabled: bool, session: &mut DaemonSession) -> Result<Vec<PluginView>, CommandError> {
    Ok(session.call(&PluginEnable { name, enabled })?.plugins)
}

fn state(state: PluginState) -> Cell {
    let (word, paint) = match state {
        PluginState::Starting => ("starting", Paint::Plain),
        PluginState::Running => ("running", Paint::Good),
        PluginState::Disabled => ("disabled", Paint::Dim),
        PluginState::Backoff => ("backoff", Paint::Attention),
        PluginState::Quarantined => ("quarantined", Paint::Bad),
        PluginState::Failed => ("failed", Paint::Bad),
    };
    Cell::painted(word, paint)
}
