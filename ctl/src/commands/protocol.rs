//! `call`, `version`, `daemon reload` and `completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;
use fermata_protocol::PROTOCOL_VERSION;
use fermata_protocol::daemon::DaemonReload;
use serde_json::{Map, Value, json};

use super::arguments::text_or_stdin;
use crate::cli::Cli;
use crate::cli::groups::DaemonCommand;
use crate::errors::{CommandError, CommandResult};
use crate::output::{FieldList, Format};
use crate::session::DaemonSession;

pub fn call(session: &mut DaemonSession, method: &str, params: Option<String>) -> CommandResult {
    let params = match params {
        None => Map::new(),
        Some(text) => {
            let text = text_or_stdin(Some(text))?;
            serde_json::from_str(&text).map_err(|e| {
                CommandError::usage(format!("the parameters are not a JSON object: {e}"))
                    .hint("for example: '{\"project\": \"web\"}'")
            })?
        }
    };
    let result: Value = session.call_raw(method, params)?;
    match session.out.format() {
        Format::Json | Format::Ids => session.out.json(&result)?,
        Format::Human => {
            let text = serde_json::to_string_pretty(&result)
                .map_err(|e| CommandError::local(format!("failed to serialise the result: {e}")))?;
            session.out.line(text)?;
        }
    }
    Ok(0)
}

/// Prints the versions of this program and of the daemon, which is never started for it.
pub fn version(session: &mut DaemonSession) -> CommandResult {
    session.globals.no_autostart = true;
    let own = env!("CARGO_PKG_VERSION");
    let daemon = session.hello().ok();
    let value = json!({
        "version": own,
        "protocol": PROTOCOL_VERSION,
        "daemon": daemon.as_ref().map(|hello| json!({
            "version": hello.version,
            "protocol": hello.protocol,
            "role": hello.role,
        })),
    });
    session.out.object(&value, Some(own.into()), |out, _| {
        let daemon = match &daemon {
            Some(hello) => format!("{} (protocol {})", hello.version, hello.protocol),
            None => "not reachable".into(),
        };
        let fields = FieldList::default()
            .add("fermatactl", format!("{own} (protocol {PROTOCOL_VERSION})"))
            .add("daemon", daemon);
        out.fields(&fields)
    })?;
    Ok(0)
}

pub fn daemon(session: &mut DaemonSession, command: DaemonCommand) -> CommandResult {
    let DaemonCommand::Reload = command;
    let result = session.call(&DaemonReload {})?;
    session.out.object(&result, None, |out, result| {
        if result.changed.is_empty() && result.needs_restart.is_empty() {
            return out.line("nothing changed");
        }
        let list = |names: &[String]| Some(names.join(", ")).filter(|t| !t.is_empty());
        let fields = FieldList::default()
            .add_some("changed", list(&result.changed))
            .add_some("restart required for", list(&result.needs_restart));
        out.fields(&fields)
    })?;
    Ok(0)
}

pub fn completions(session: &mut DaemonSession, shell: Shell) -> CommandResult {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fermatactl", &mut script);
    session.out.text(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
