//! One file per group of commands, and the dispatch to them.

mod agent_reports;
mod agents;
mod arguments;
mod attach;
mod checkpoint;
mod context;
mod declared_agents;
mod doctor;
mod down;
mod events;
mod logs;
mod operation;
mod pause;
mod plugin;
mod project;
mod protocol;
mod question;
mod readiness;
mod restore;
mod run;
mod send;
mod status;
mod task;
mod transfer;
mod up;

use std::time::Duration;

use crate::cli::CliCommand;
use crate::cli::groups::AgentCommand;
use crate::errors::{CommandError, CommandResult};
use crate::session::DaemonSession;
use crate::units::duration;

/// How much longer than the daemon's own wait this program waits.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(5);

/// Runs a command.
pub fn run(session: &mut DaemonSession, command: CliCommand) -> CommandResult {
    if let Some(timeout) = session.globals.timeout
        && let Some(timeout) = process_timeout(&command, timeout)
    {
        exit_after(timeout, session.globals.json)?;
    }
    match command {
        CliCommand::Run(args) => run::run(session, args.into_inner()),
        CliCommand::Up(args) => up::up(session, &args),
        CliCommand::Down(args) => down::down(session, &args),
        CliCommand::Ps { project } => status::ps(session, project),
        CliCommand::Status { project } => status::status(session, project),
        CliCommand::Pause(args) => pause::pause(session, args.into_inner()),
        CliCommand::Resume { target, checkpoint, over_budget } => {
            pause::resume(session, target, checkpoint, over_budget)
        }
        CliCommand::Stop { target, grace } => agents::stop(session, target, grace),
        CliCommand::Restart { target } => agents::restart(session, &target),
        CliCommand::Kill { target, signal } => agents::kill(session, target, signal),
        CliCommand::Rm { target, with_checkpoints } => agents::remove(session, target, with_checkpoints),
        CliCommand::Logs(args) => logs::logs(session, args.into_inner()),
        CliCommand::Attach(args) => attach::attach(session, &args),
        CliCommand::Send(args) => send::send(session, &args),
        CliCommand::Wait { target, propagate } => agents::wait(session, &target, propagate),
        CliCommand::Project(command) => project::run(session, command.into_inner()),
        CliCommand::Op(command) => operation::run(session, command.into_inner()),
        CliCommand::Checkpoint(command) => checkpoint::run(session, command.into_inner()),
        CliCommand::Context(command) => context::run(session, command.into_inner()),
        CliCommand::Task(command) => task::run(session, command.into_inner()),
        CliCommand::Inbox { project, all } => question::inbox(session, project, all),
        CliCommand::Answer { question, text } => question::answer(session, question, &text),
        CliCommand::Events(args) => events::events(session, args.into_inner()),
        CliCommand::Plugin(command) => plugin::run(session, command.into_inner()),
        CliCommand::Agent(command) => agent_reports::run(session, command.into_inner()),
        CliCommand::Daemon(command) => protocol::daemon(session, command.into_inner()),
        CliCommand::Doctor => doctor::doctor(session),
        CliCommand::Completions { shell } => protocol::completions(session, shell),
        CliCommand::Call { method, params } => protocol::call(session, &method, params),
        CliCommand::Version => protocol::version(session),
    }
}

/// Returns the time after which the process exits because of `--timeout`; `None` for a command that refuses the option.
fn process_timeout(command: &CliCommand, timeout: Duration) -> Option<Duration> {
    // A thread that ends the process would leave the terminal in raw mode.
    if matches!(command, CliCommand::Attach(_)) {
        return None;
    }
    let waits_in_daemon = matches!(command, CliCommand::Wait { .. })
        || matches!(command, CliCommand::Run(run) if run.wait && !run.logs)
        || matches!(command, CliCommand::Agent(agent)
            if matches!(**agent, AgentCommand::Ask { wait: true, .. } | AgentCommand::WaitAnswer { .. }));
    // The daemon gets the timeout of such a command, and reports its expiry better than this program can.
    Some(if waits_in_daemon { timeout + TIMEOUT_MARGIN } else { timeout })
}

/// Makes the process exit with code 6 after `timeout`, from a thread of its own: the main thread blocks in reads.
fn exit_after(timeout: Duration, json: bool) -> Result<(), CommandError> {
    std::thread::Builder::new()
        .name("timeout".into())
        .spawn(move || {
            std::thread::sleep(timeout);
            let error =
                CommandError::timed_out(format!("not done after {}", duration(timeout.as_secs_f64() * 1_000.0)))
                    .hint("operations in progress continue in the daemon; list them with: fermatactl op ls");
            error.print(json);
            std::process::exit(i32::from(error.exit_number()));
        })
        .map(drop)
        .map_err(|e| CommandError::io("start the timer of --timeout", &e))
}
