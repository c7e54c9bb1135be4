//! `ps` and `status`: agents, projects and the daemon.

use std::io;

use fermata_protocol::ProjectName;
use fermata_protocol::agent::{AgentStatus, AgentView};
use fermata_protocol::budget::{Budget, Usage};
use fermata_protocol::context::ContextSummary;
use fermata_protocol::daemon::DaemonStatus;
use fermata_protocol::project::{
    AutomaticCheckpoints, PauseView, ProjectDetail, ProjectList, ProjectShow, ProjectView, ScanProgress,
};
use serde_json::json;

use super::arguments::{all_agents, target_of};
use crate::errors::CommandResult;
use crate::output::{Cell, FieldList, Format, Paint, Printer, TextTable, agent_status, note, project_status};
use crate::session::DaemonSession;
use crate::units::{bytes, counted, dollars, duration, now, number, time_left, until};

pub fn ps(session: &mut DaemonSession, project: Option<ProjectName>) -> CommandResult {
    let agents = all_agents(session, project.as_ref())?;
    session.out.rows(&agents, "no agents", target_of, agent_table)?;
    note_old_samples(session, &agents);
    Ok(0)
}

/// Writes a note when the samples of CPU and memory are old.
fn note_old_samples(session: &DaemonSession, agents: &[AgentView]) {
    const OLD_MS: i64 = 10_000;
    let oldest = agents.iter().filter_map(|agent| Some(agent.load?.sampled_at)).min();
    if let Some(oldest) = oldest.filter(|at| session.out.is_human() && now().since(*at) > OLD_MS) {
        note(&format!("CPU and memory were sampled {}; new samples are being taken", session.out.ago(oldest)));
    }
}

pub fn agent_table(out: &Printer, agents: &[AgentView]) -> TextTable {
    let headings = ["AGENT", "STATUS", ">PID", "SINCE", ">CPU", ">MEM", ">PROCS", "PROGRESS", ">TOKENS", "COMMAND"];
    let mut table = TextTable::new(&headings);
    for agent in agents {
        let tokens = agent.usage.input_tokens + agent.usage.output_tokens;
        table.row([
            target_of(agent).to_string().into(),
            status_cell(out, agent),
            agent.pid.map(|pid| pid.to_string()).unwrap_or_default().into(),
            since(out, agent).into(),
            agent.load.and_then(|load| load.cpu_percent).map(|cpu| format!("{cpu:.0}%")).unwrap_or_default().into(),
            agent.load.map(|load| bytes(load.memory_bytes)).unwrap_or_default().into(),
            agent.load.map(|load| load.processes.to_string()).unwrap_or_default().into(),
            progress(agent).into(),
            if tokens == 0 { String::new() } else { number(tokens) }.into(),
            Cell::painted(agent.argv.join(" "), Paint::Dim),
        ]);
    }
    table
}

fn status_cell(out: &Printer, agent: &AgentView) -> Cell {
    if let Some(at) = agent.next_start_at {
        return Cell::painted(format!("{} (starts {})", agent.status, until(at, out.now())), Paint::Attention);
    }
    if !agent.waits_for.is_empty() {
        let names: Vec<&str> = agent.waits_for.iter().map(|name| name.as_str()).collect();
        return Cell::painted(format!("waiting for {}", names.join(", ")), Paint::Attention);
    }
    if agent.stale_at.is_some() {
        return Cell::painted(format!("{} (stale)", agent.status), Paint::Attention);
    }
    match agent.exit {
        Some(exit) if agent.status.is_terminal() && !exit.is_success() => {
            Cell::painted(format!("{} ({exit})", agent.status), Paint::Bad)
        }
        _ if agent.suspended_at.is_some() => Cell::painted(format!("{}, suspended", agent.status), Paint::Attention),
        _ => agent_status(agent.status),
    }
}

fn since(out: &Printer, agent: &AgentView) -> String {
    let at = if agent.status.is_terminal() { agent.ended_at.or(agent.started_at) } else { agent.started_at };
    at.map(|at| out.ago(at)).unwrap_or_default()
}

fn progress(agent: &AgentView) -> String {
    let Some(progress) = &agent.progress else {
        return String::new();
    };
    let percent = progress.percent.map(|percent| format!("{percent:.0}%"));
    let message = progress.message.clone();
    let text = percent.into_iter().chain(message).collect::<Vec<_>>().join(" ");
    // Only a running agent makes progress; the estimate of another one is outdated.
    let is_running = matches!(agent.status, AgentStatus::Running | AgentStatus::WaitingForInput);
    let left = agent.remaining_ms.filter(|_| is_running).and_then(time_left);
    left.map_or(text.clone(), |left| format!("{text}, {left}"))
}

/// Formats the state of an agent in a few words: `running, pid 12`, `failed (exit code 1)`.
pub fn agent_state(agent: &AgentView) -> String {
    let status = match agent.exit {
        Some(exit) if agent.status.is_terminal() => format!("{} ({exit})", agent.status),
        _ => agent.status.to_string(),
    };
    match (&agent.detail, agent.pid) {
        (Some(detail), _) => format!("{status}, {detail}"),
        (None, Some(pid)) if !agent.status.is_terminal() => format!("{status}, pid {pid}"),
        (None, _) => status,
    }
}

pub fn status(session: &mut DaemonSession, project: Option<ProjectName>) -> CommandResult {
    if let Some(project) = project {
        return show(session, project);
    }
    let daemon = session.call(&DaemonStatus {})?;
    let projects = session.call(&ProjectList {})?.projects;
    match session.out.format() {
        Format::Json => session.out.json(&json!({ "daemon": daemon, "projects": projects }))?,
        Format::Ids => {
            for project in &projects {
                session.out.line(&project.name)?;
            }
        }
        Format::Human => {
            let out = &mut session.out;
            let fields = FieldList::default()
                .add(
                    "daemon",
                    format!("{}, pid {}, started {}", daemon.version, daemon.pid, out.ago(daemon.started_at)),
                )
                .add("socket", &daemon.socket)
                .add("state", &daemon.state_dir)
                .add("freezer", &daemon.freezer)
                .add("agents", format!("{} running", daemon.agents_running));
            out.fields(&fields)?;
            for line in &daemon.recovery {
                out.fields(&FieldList::default().add("recovery", line))?;
            }
            if !projects.is_empty() {
                out.line("")?;
                let table = project_table(out, &projects);
                out.table(&table)?;
            }
            for project in &projects {
                if let Some(scan) = &project.look {
                    out.line(format_args!("{}: scanning the workspace: {}", project.name, scan_progress(scan)))?;
                }
            }
        }
    }
    Ok(0)
}

pub fn project_table(out: &Printer, projects: &[ProjectView]) -> TextTable {
    let mut table = TextTable::new(&[
        "PROJECT",
        "STATUS",
        "PHASE",
        ">AGENTS",
        ">TASKS",
        ">QUESTIONS",
        ">DISK",
        "SINCE",
        "WORKSPACE",
    ]);
    for project in projects {
        let questions = match project.open_questions {
            0 => Cell::from(""),
            open => Cell::painted(open.to_string(), Paint::Attention),
        };
        let since = match &project.pause {
            Some(pause) => format!("paused {}", out.ago(pause.paused_at)),
            None => out.ago(project.created_at),
        };
        table.row([
            Cell::from(&project.name.as_str()),
            project_status(project.status),
            project.phase.as_str().into(),
            format!("{}/{}", project.agents_running, project.agents).into(),
            tasks(project).into(),
            questions,
            project.disk_bytes.map(bytes).unwrap_or_default().into(),
            since.into(),
            Cell::painted(&project.workspace, Paint::Dim),
        ]);
    }
    table
}

/// Formats the progress of a workspace scan.
fn scan_progress(scan: &ScanProgress) -> String {
    let ScanProgress { step, done, total, unit } = scan;
    match total {
        0 => step.clone(),
        _ => format!("{step}, {} of {} {unit}", number(*done), number(*total)),
    }
}

fn tasks(project: &ProjectView) -> String {
    match project.tasks_total {
        0 => String::new(),
        total => format!("{}/{total}", project.tasks_completed),
    }
}

pub fn show(session: &mut DaemonSession, project: ProjectName) -> CommandResult {
    let detail = session.call(&ProjectShow { project })?;
    let id = Some(detail.project.name.to_string());
    session.out.object(&detail, id, print_project)?;
    Ok(0)
}

/// Formats when the daemon creates checkpoints by itself.
fn automatic(config: &AutomaticCheckpoints) -> String {
    let AutomaticCheckpoints { every_units, every_ms, on_phase_change, before_shutdown } = *config;
    let when = [
        (every_ms > 0).then(|| format!("every {} of run time", duration(every_ms as f64))),
        (every_units > 0).then(|| format!("every {} of progress", counted(every_units, "unit"))),
        on_phase_change.then(|| "on phase changes".to_owned()),
        before_shutdown.then(|| "on daemon shutdown".to_owned()),
    ];
    let when: Vec<String> = when.into_iter().flatten().collect();
    if when.is_empty() { "off".into() } else { when.join(", ") }
}

/// Formats a budget and how much of it is spent; `None` without limits.
fn budget(budget: &Budget, spent: &Usage) -> Option<String> {
    let tokens = budget.tokens.map(|bound| format!("{} of {} tokens", number(spent.tokens()), number(bound)));
    let cost = budget.cost_micro_usd.map(|bound| format!("{} of {}", dollars(spent.cost_micro_usd), dollars(bound)));
    let waived = budget.waived.then(|| "waived until it is set again".to_owned());
    let parts: Vec<String> = tokens.into_iter().chain(cost).chain(waived).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn print_project(out: &mut Printer, detail: &ProjectDetail) -> io::Result<()> {
    let project = &detail.project;
    let fields = project_fields(out, detail);
    out.fields(&fields)?;
    if !detail.agents.is_empty() {
        out.line("")?;
        let table = agent_table(out, &detail.agents);
        out.table(&table)?;
    }
    let details = detail.agents.iter().filter_map(|agent| {
        let detail = agent.detail.as_ref()?;
        Some(format!("{}: {detail}", target_of(agent)))
    });
    let pause = project.pause.iter().flat_map(|pause| pause.warnings.iter().cloned());
    out.warnings(&details.chain(pause).collect::<Vec<_>>())?;
    if project.open_questions > 0 {
        let questions = counted(project.open_questions, "open question");
        note(&format!("{questions}; list with: fermatactl inbox {}", project.name));
    }
    Ok(())
}

fn project_fields(out: &Printer, detail: &ProjectDetail) -> FieldList {
    let project = &detail.project;
    let source = project.source.as_ref().map(|source| {
        let branch = source.branch.as_ref().map(|b| format!(" ({b})"));
        format!("{} {}{}", source.kind, source.location, branch.unwrap_or_default())
    });
    let cause = project.pause.as_ref().map(|pause| pause.cause).filter(|cause| !cause.is_person());
    let broken = project.broken.as_ref().map(|broken| {
        format!(
            "{}; to undo the restore: fermatactl checkpoint restore {} {}",
            broken.error.message, project.name, broken.safety_checkpoint_id
        )
    });
    let restored = project.pause.as_ref().and_then(|pause| pause.restored);
    let operation = detail.operation.as_ref().map(|op| {
        let step = op.step.as_deref().unwrap_or("");
        format!("{} {} {} {step}", op.id, op.kind.as_str(), op.state.as_str())
    });
    FieldList::default()
        .add("project", project.name.as_str())
        .add_some("description", Some(&project.description).filter(|d| !d.is_empty()))
        .add("status", project_status(project.status))
        .add("phase", project.phase.as_str())
        .add("workspace", &project.workspace)
        .add_some("source", source)
        .add_some("paused", project.pause.as_ref().map(|pause| pause_text(out, pause)))
        .add_some("paused by", cause.map(|cause| cause.as_str().replace('_', " ")))
        .add_some("budget", budget(&detail.config.budget, &project.usage))
        .add_some("broken", broken)
        .add_some("restored", restored.map(|n| format!("checkpoint {n}; resume restarts the agents")))
        .add("created", out.ago(project.created_at))
        .add_some("total paused", (project.total_paused_ms > 0).then(|| duration(project.total_paused_ms as f64)))
        .add_some("operation", operation)
        .add_some("workspace scan", project.look.as_ref().map(scan_progress))
        .add_some("tasks", Some(tasks(project)).filter(|t| !t.is_empty()))
        .add("checkpoints", checkpoints_text(out, detail))
        .add("auto checkpoint", automatic(&detail.config.automatic))
        .add_some("context", (detail.context.items > 0).then(|| context_text(&detail.context)))
}

fn pause_text(out: &Printer, pause: &PauseView) -> String {
    format!(
        "{}, {} ({}), checkpoint {}{}",
        out.ago(pause.paused_at),
        pause.mode.as_str(),
        pause.mechanism.as_str(),
        pause.checkpoint_id,
        pause.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default()
    )
}

fn checkpoints_text(out: &Printer, detail: &ProjectDetail) -> String {
    let disk = detail.project.disk_bytes.map(|disk| format!(", {} on disk", bytes(disk))).unwrap_or_default();
    let latest = detail.last_checkpoint.as_ref().map(|checkpoint| {
        format!(
            "; latest: {} ({}, {}, {})",
            checkpoint.id,
            checkpoint.trigger.as_str(),
            out.ago(checkpoint.created_at),
            bytes(checkpoint.size_bytes)
        )
    });
    format!("{}{disk}{}", detail.checkpoints, latest.unwrap_or_default())
}

fn context_text(context: &ContextSummary) -> String {
    format!(
        "{} ({} hot, {} warm, {} cold, {} archived)",
        counted(context.tokens, "token"),
        context.hot,
        context.warm,
        context.cold,
        context.archived
    )
}
