//! `call`, `version`, `daemon reload` and `completions`: the program and the protocol themselves.

use clap::CommandFactory as _;
use clap_complete::Shell;
use fermata_protocol::PROTOCOL_VERSION;
use fermata_protocol::daemon::DaemonReload;
use serde_json::{Map, Value, json};

use super::{Ended, text_or_stdin};
use crate::cli::Cli;
use crate::cli::groups::DaemonCommand;
use crate::errors::Failure;
use crate::output::{Facts, Format};
use crate::session::Session;

/// Runs `call`.
pub fn call(session: &mut Session, method: &str, params: Option<String>) -> Ended {
    let params = match params {
        None => Map::new(),
        Some(text) => {
            let text = text_or_stdin(Some(text))?;
            serde_json::from_str(&text).map_err(|e| {
                Failure::usage(format!("the parameters are not a JSON object: {e}"))
                    .hint("write for instance '{\"project\": \"web\"}'")
            })?
        }
    };
    let result: Value = session.call_raw(method, params)?;
    match session.out.format() {
        Format::Json | Format::Ids => session.out.json(&result)?,
        Format::Human => {
            let text = serde_json::to_string_pretty(&result)
                .map_err(|e| Failure::local(format!("failed to write the result: {e}")))?;
            session.out.line(text)?;
        }
    }
    Ok(0)
}

/// Runs `version`; a daemon is asked when one runs, and never started for this.
pub fn version(session: &mut Session) -> Ended {
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
    session.out.one(&value, Some(own.into()), |out, _| {
        let daemon = match &daemon {
            Some(hello) => format!("{} (protocol {})", hello.version, hello.protocol),
            None => "not reachable".into(),
        };
        let facts =
            Facts::default().add("fermatactl", format!("{own} (protocol {PROTOCOL_VERSION})")).add("daemon", daemon);
        out.facts(&facts)
    })?;
    Ok(0)
}

/// Runs a `daemon` command.
pub fn daemon(session: &mut Session, command: DaemonCommand) -> Ended {
    let DaemonCommand::Reload = command;
    let result = session.call(&DaemonReload {})?;
    session.out.one(&result, None, |out, result| {
        if result.changed.is_empty() && result.needs_restart.is_empty() {
            return out.line("nothing changed");
        }
        let list = |names: &[String]| Some(names.join(", ")).filter(|t| !t.is_empty());
        let facts = Facts::default()
            .maybe("changed", list(&result.changed))
            .maybe("needs a restart", list(&result.needs_restart));
        out.facts(&facts)
    })?;
    Ok(0)
}

/// Runs `completions`.
pub fn completions(session: &mut Session, shell: Shell) -> Ended {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fermatactl", &mut script);
    session.out.text(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
